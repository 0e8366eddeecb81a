"""``Calibrator``: quantize a model that is in memory, in place, and save it."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from slim_core.dtypes import float_name
from slim_core.errors import (
    CalibrationError,
    InvalidValueError,
    StructureError,
)
from slim_core.groups import is_expert
from slim_core.layers import QuantizedLinear
from slim_core.logging import get_logger
from slim_core.progress import track
from slim_core.recipe import ObserverKind
from slim_core.scheme import QuantScheme
from slim_core.tensor_parallel import layer_of, slice_name
from slim_core.validate import check_type
from slim_ptq.attention.model_attention import ModelAttention
from slim_ptq.calibration.moments import model_inputs
from slim_ptq.calibration.observed import ObservedLinear
from slim_ptq.calibration.samples import check_samples, feed
from slim_ptq.config import QuantConfig
from slim_ptq.flatquant import train_model
from slim_ptq.layer_schemes import disabled_names, parse_level, resolve_schemes
from slim_ptq.methods import FlatQuant, LayerInputs, Needs, WeightMethod, make_method
from slim_ptq.mixed import check_mix
from slim_ptq.model_dtype import model_dtype
from slim_ptq.modules import FakeQuantLinear
from slim_ptq.observers import Observer, make_observer
from slim_ptq.offload import discard, keep_like, place, resident
from slim_ptq.pipeline.quantizing import quantize_weight
from slim_ptq.pipeline.suppressing import suppress_model
from slim_ptq.save import save_model
from slim_ptq.structure import (
    bias_of,
    checkpoint_names,
    find_linears,
    unfuse_experts,
    weight_of,
)
from slim_ptq.tensor_parallel import ParallelLinear, measure_communication, sliced_layers
from slim_ptq.transforms import AlphaSearch, has_added_bias

_log = get_logger("ptq")

_OBSERVERS = {1: ObserverKind.MEAN_MINMAX, 2: ObserverKind.HISTOGRAM, 3: ObserverKind.AUTO}
_SEED = 0  # of the choice which calibration activations are passed on quantized


class Calibrator:
    """Quantizes the linear layers of a model in place.

    With a static type the experts of a mixture are quantized per token, unless ``mix_cfg`` says
    otherwise: no engine runs experts with static activations.  Routers stay in floating point.

    Parameters
    ----------
    model : torch.nn.Module
        A Hugging Face causal language model, or any module with a ``config``.
    cfg : QuantConfig
    calib_data : list of list or dict, optional
        Samples, called as ``model(*sample)`` or ``model(**sample)``.  Types without static
        activations need none.
    disable_level : str
        ``L0``, ``L1``, ...: how many further layers, those with the most extreme input, stay in
        floating point.  Layers that engines run as one matrix stay together.
    all_tensors : dict, optional
        Accepted for compatibility and not used.
    mix_cfg : dict, optional
        Layer names or patterns to ``w8a8``, ``w8a16``, ``w8a8_dynamic``, ``w4a8_dynamic`` or
        ``float``.

    Attributes
    ----------
    model : torch.nn.Module
        The model; after :meth:`run` it computes what the deployed model computes.

    Raises
    ------
    InvalidTypeError, InvalidValueError, PatternError, CalibrationError, StructureError
        Before any work.
    """

    def __init__(
        self,
        model: nn.Module,
        cfg: QuantConfig,
        calib_data: list[Any] | None = None,
        disable_level: str = "L0",
        all_tensors: dict[str, torch.Tensor] | None = None,
        mix_cfg: dict[str, str] | None = None,
    ) -> None:
        self.model = check_type("model", model, nn.Module)
        self.cfg = check_type("cfg", cfg, QuantConfig)
        self._samples = check_samples("calib_data", calib_data)
        level = parse_level(disable_level)
        if all_tensors is not None:
            check_type("all_tensors", all_tensors, dict)
        mix = check_mix(mix_cfg)
        self._scheme = cfg.scheme()
        self._dtype = model_dtype(model)
        self._done = False

        model.eval()
        place(model, cfg.device)
        unfuse_experts(model)
        self._rename = checkpoint_names(model)
        self._linears = find_linears(model)
        if not self._linears:
            raise StructureError(f"{type(model).__name__} has no linear layer")
        self._schemes = resolve_schemes(
            model, self._linears, cfg, samples=self._samples, level=level, mix=mix
        )
        self._sliced = sliced_layers(self._linears, self._schemes, cfg.tp_size)
        if cfg.do_smooth and not self._samples:
            raise CalibrationError("calib_data is empty, and do_smooth needs samples")
        for name, linear in self._linears.items():
            if has_added_bias(linear) and not self._schemes[name].is_static:
                _log.warning(
                    "%s is %s and makes up for a shift in a bias that engines may drop",
                    name,
                    self._schemes[name],
                )
        if any(scheme.is_static for scheme in self._schemes.values()) and not self._samples:
            raise CalibrationError(
                "calib_data is empty, and static activation quantization needs samples",
                hint="pass calib_data, or use is_dynamic=True or a_bit=16",
            )
        if not self._samples and any(self._needs().values()):
            raise CalibrationError(
                f"calib_data is empty, and w_method {cfg.w_method!r} needs samples",
                hint="pass calib_data, or use w_method 'MinMax' or 'HQQ'",
            )
        self._learned: dict[str, LayerInputs] = {}
        disabled = disabled_names(model, self._linears, cfg)
        self._attention = ModelAttention(model, cfg, self._linears, self._samples, disabled)

    def run(self, int_infer: bool = False) -> None:
        """Quantize; afterwards the model holds quantized layers and still generates text.

        Parameters
        ----------
        int_infer : bool
            Accepted for compatibility: statically quantized layers always multiply integers.

        Raises
        ------
        NumericalError
            A weight or an activation is NaN or infinite; names the layer.
        CalibrationError
            No sample reached a layer, or the model cannot run on a sample.
        """
        check_type("int_infer", int_infer, bool)
        if self._done:
            raise InvalidValueError("the model is quantized already")
        try:
            with torch.no_grad():
                self._quantize()
                self._attention.emulate()
        except BaseException:
            self._attention.undo()
            for name, linear in self._linears.items():  # the model is what it was before
                self._put(name, linear)
            raise
        self._done = True

    def save(
        self,
        output_path: str,
        safetensors_name: str | None = None,
        json_name: str | None = None,
        save_type: list[str] | None = None,
        part_file_size: int | None = None,
    ) -> None:
        """Write the quantized weights and their description.

        Parameters
        ----------
        output_path : str
            Directory, made with mode 0750 if it does not exist.
        safetensors_name, json_name : str, optional
            Names of the files, ending in ``.safetensors`` and ``.json``.
        save_type : list of str, optional
            ``safe_tensor`` (default), ``numpy``, ``ascendV1``; the last one is written alone.
        part_file_size : int, optional
            Size of a part in GiB; one file if not given.

        Raises
        ------
        InvalidValueError
            Before :meth:`run`, or for a wrong name or value.
        """
        if not self._done:
            raise InvalidValueError("call run() before save()")
        save_model(
            self.model,
            output_path,
            rename=self._rename,
            model_type=self._scheme.ascend_type,
            group_size=max(scheme.group_size for scheme in self._schemes.values()),
            model_dtype=float_name(self._dtype),
            safetensors_name=safetensors_name,
            json_name=json_name,
            save_type=save_type,
            part_file_size=part_file_size,
        )

    def _smooth(self) -> None:
        """Suppress outliers as ``do_smooth`` asks, in the layers that will be quantized."""
        done = suppress_model(
            self.model, self._samples, AlphaSearch(), self._schemes.__getitem__, {}
        )
        for item in done.skipped:
            _log.warning("%s is not smoothed: %s", item.source, item.reason)

    def _quantize(self) -> None:
        if self.cfg.do_smooth:
            self._smooth()
        self._attention.measure()
        self._train()
        observed = self._replace_layers()
        if observed:
            for _ in feed(self.model, self._samples, "Calibrating"):
                pass
            for name, module in observed.items():
                self._put(name, module.finish(self._observer_of(name, observed)), "codes")
                discard(module)
        if self._sliced and self.cfg.enable_communication_quant:
            measure_communication(
                self.model, self._samples, per_device=self.cfg.enable_per_device_quant
            )

    def _train(self) -> None:
        """Learn the transforms of FlatQuant, block by block; without samples there are none."""
        methods = self._methods()
        trained = {name: m for name, m in methods.items() if isinstance(m, FlatQuant)}
        if trained and self._samples:
            self._learned = train_model(self.model, self._samples, trained, self._schemes)
        elif trained:
            _log.warning("calib_data is empty: the transforms of FlatQuant are identities")

    def _replace_layers(self) -> dict[str, ObservedLinear]:
        """Quantize all weights; return the layers whose input range is still to be found."""
        generator = torch.Generator().manual_seed(_SEED)
        observed: dict[str, ObservedLinear] = {}
        layers: dict[str, QuantizedLinear] = {}
        # All inputs are those of the float model: nothing is replaced before all are seen.
        for inputs in model_inputs(self.model, self._linears, self._needs(), self._samples):
            layers |= {name: self._layer(name, seen) for name, seen in inputs.items()}
        for name in track(list(self._linears), "Quantizing weights"):
            scheme = self._schemes[name]
            if scheme.weight is None:
                continue
            if name in self._sliced:
                parts = [self._observed(part, generator) for part in self._slices(name)]
                self._put(name, ParallelLinear(parts))
                for index, part in enumerate(parts):
                    observed[slice_name(name, index)] = part
                    self._put(slice_name(name, index), part, "observed")
                continue
            layer = layers.pop(name, None) or self._layer(name)
            if scheme.activation is None or scheme.is_dynamic:
                self._put(name, FakeQuantLinear(layer, self._dtype), "codes")
                continue
            observed[name] = self._observed(layer, generator)
            self._put(name, observed[name], "observed")
        return observed

    def _observed(self, layer: QuantizedLinear, generator: torch.Generator) -> ObservedLinear:
        """Return what stands for a layer with static activations during calibration."""
        assert layer.scheme.activation is not None  # narrowing: only such layers come here
        return ObservedLinear(
            layer,
            layer.scheme.activation,
            make_observer(_OBSERVERS[self.cfg.act_method]),
            dtype=self._dtype,
            keep=self.cfg.pr,
            generator=generator,
        )

    def _methods(self) -> dict[str, WeightMethod]:
        """Return the methods of the quantized layers."""
        return {
            name: make_method(self.cfg.method(scheme))
            for name, scheme in self._schemes.items()
            if not scheme.is_float
        }

    def _needs(self) -> dict[str, Needs]:
        """Return what methods have to know of the inputs of single layers."""
        return {name: method.needs & ~Needs.BLOCK for name, method in self._methods().items()}

    def _layer(self, name: str, inputs: LayerInputs | None = None) -> QuantizedLinear:
        """Return a layer with its weight quantized."""
        linear = self._linears[name]
        with resident(linear):
            return self._quantized(
                name,
                self._schemes[name],
                weight_of(linear),
                bias_of(linear),
                inputs or self._learned.get(name),
            )

    def _slices(self, name: str) -> list[QuantizedLinear]:
        """Return the slices of a layer, each quantized alone; the first one has the bias."""
        linear = self._linears[name]
        with resident(linear):
            parts = weight_of(linear).chunk(self.cfg.tp_size or 1, dim=1)
            return [
                self._quantized(
                    slice_name(name, index),
                    self._schemes[name],
                    part.contiguous(),
                    None if index else bias_of(linear),
                )
                for index, part in enumerate(parts)
            ]

    def _quantized(
        self,
        name: str,
        scheme: QuantScheme,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        inputs: LayerInputs | None = None,
    ) -> QuantizedLinear:
        return quantize_weight(
            name,
            scheme,
            self.cfg.method(scheme),
            weight,
            bias,
            model_dtype=float_name(self._dtype),
            inputs=inputs,
        )

    def _observer_of(self, name: str, observed: dict[str, ObservedLinear]) -> Observer | None:
        """Return the observer whose range a layer takes, None for its own.

        An expert that no token was routed to takes that of the same projection of another expert.
        """
        if observed[name].observer.samples or not is_expert(name):
            return None
        for other, module in observed.items():
            if module.observer.samples and _projection(other) == _projection(name):
                _log.warning("%s saw no token and takes the input range of %s", name, other)
                return module.observer
        return None

    def _put(self, name: str, module: nn.Module, store: str = "") -> None:
        """Put a module in the place of a layer or of a slice of one.

        Offloaded as the layer was, its tensors under names that begin with ``store``.
        """
        if store:
            owner = layer_of(name)
            keep_like(module, self._linears[owner], f"{store}{name.removeprefix(owner)}.")
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, module)


def _projection(expert: str) -> str:
    """Return the name of an expert's layer without the number of the expert."""
    return re.sub(r"\.experts\.\d+\.", ".experts.*.", expert)
