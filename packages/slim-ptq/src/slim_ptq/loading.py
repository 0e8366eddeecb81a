"""Building models without their weights, and filling in parts of them from a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from slim_core.checkpoint import Checkpoint
from slim_core.errors import CheckpointError, StructureError
from slim_ptq.tensors import from_numpy


def empty_model(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """Return the language model of a checkpoint with all parameters on the meta device.

    Buffers that the code computes (rotary frequencies) are real.

    Parameters
    ----------
    checkpoint : Checkpoint
        A directory with a ``config.json``.
    trust_remote_code : bool
        Run model code that lies in the checkpoint directory.

    Raises
    ------
    CheckpointError
        There is no configuration.
    StructureError
        transformers cannot build the model.
    """
    from transformers import AutoConfig

    if not checkpoint.config:
        raise CheckpointError(f"{checkpoint.path} has no config.json")
    try:
        config = AutoConfig.from_pretrained(
            checkpoint.path, trust_remote_code=trust_remote_code, local_files_only=True
        )
        factory = model_factory(checkpoint.config)
        model = _without_parameters(
            lambda: factory.from_config(config, trust_remote_code=trust_remote_code)
        )
    except (ValueError, KeyError, ImportError, OSError, AttributeError) as error:
        raise StructureError(
            f"transformers cannot build the model of {checkpoint.path}: {error}",
            hint=None
            if trust_remote_code
            else "models with code of their own need trust_remote_code=True (--trust-remote-code)",
        ) from error
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    return model


def model_factory(config: Mapping[str, Any]) -> Any:
    """Return the automatic class of transformers for a configuration.

    Models that read images and text have one of their own; everything else is a causal language
    model.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    kind = config.get("model_type")
    with_images = kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    causal = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "auto_map" in config
    if with_images and not causal:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def load_parameters(
    module: nn.Module,
    prefix: str,
    checkpoint: Checkpoint,
    rename: Callable[[str], str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    recurse: bool = True,
) -> None:
    """Replace the meta parameters of a module, and the buffers that are saved with it.

    Parameters
    ----------
    prefix : str
        Name of the module in the model.
    rename : callable
        From names in the model to names in the checkpoint.
    dtype : torch.dtype
        Of the floating-point parameters afterwards.

    Raises
    ------
    CheckpointError
        A parameter is not in the checkpoint or has another shape there.
    """
    for owner_path, owner in module.named_modules() if recurse else [("", module)]:
        path = ".".join(part for part in (prefix, owner_path) if part)
        for local, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_meta:
                name = rename(f"{path}.{local}" if path else local)
                tensor = _read(checkpoint, name, tuple(parameter.shape))
                tensor = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
                setattr(owner, local, nn.Parameter(tensor, requires_grad=False))
        for local, buffer in list(owner.named_buffers(recurse=False)):
            name = rename(f"{path}.{local}" if path else local)
            if name in checkpoint.tensors and local not in owner._non_persistent_buffers_set:
                buffer = _read(checkpoint, name, tuple(buffer.shape)).to(buffer.dtype)
            setattr(owner, local, buffer.to(device))


def unload_parameters(module: nn.Module) -> None:
    """Put the parameters of a module back on the meta device, which frees their memory."""
    for owner in module.modules():
        for local, parameter in list(owner.named_parameters(recurse=False)):
            meta = torch.empty_like(parameter, device="meta")
            setattr(owner, local, nn.Parameter(meta, requires_grad=False))


def load_on_use(module: nn.Module, load: Callable[[nn.Module], None]) -> Any:
    """Load the parameters of a module just before its first call; returns the hook's handle."""

    def hook(called: nn.Module, _inputs: Any) -> None:
        load(called)
        handle.remove()

    handle = module.register_forward_pre_hook(hook)
    return handle


def _read(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = from_numpy(checkpoint.load(name))
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, the model wants {shape}")
    return tensor


class _EmptyOnMeta(TorchFunctionMode):
    """Puts tensors that nobody has filled on the meta device."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None and kwargs.get("out") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _without_parameters(build: Callable[[], Any]) -> Any:
    """Return a model whose parameters are on the meta device, and were never anywhere else."""
    with _parameters_on_meta():
        with _EmptyOnMeta():
            model = build()
        if any(buffer.is_meta for buffer in model.buffers()):  # its code fills it after making it
            model = build()
        return model


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move every parameter to the meta device as it is registered; buffers stay real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:
            meta = nn.Parameter(param.detach().to("meta"), requires_grad=False)
            module._parameters[name] = meta

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
