"""Per-layer types of the classic interface (``mix_cfg``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slim_core.errors import InvalidTypeError, InvalidValueError, SlimError
from slim_core.matching import match_all
from slim_core.scheme import FLOAT, QuantScheme
from slim_core.validate import check_choice, check_type
from slim_ptq.config import QuantConfig

_CHANGES: dict[str, dict[str, Any]] = {
    "w8a8": {"w_bit": 8, "a_bit": 8, "is_dynamic": False, "w_sym": True},
    "w8a16": {"w_bit": 8, "a_bit": 16, "is_dynamic": False, "pdmix": False},
    "w8a8_dynamic": {
        "w_bit": 8,
        "a_bit": 8,
        "is_dynamic": True,
        "w_sym": True,
        "pdmix": False,
    },
}
_CHANGES["w4a8_dynamic"] = _CHANGES["w8a8_dynamic"] | {
    "w_bit": 4,
    "is_lowbit": True,
    "open_outlier": False,
    "co_sparse": False,
}
TARGETS = (*_CHANGES, "float")
_DEEPSEEK = ("deepseek_v2", "deepseekv2", "deepseek_v3", "deepseekv3")
_W4A4_PARTNERS = ("w8a8", "w8a8_dynamic", "float")


def check_mix(mix_cfg: Any) -> dict[str, str]:
    """Require a mapping of layer names or patterns to types; None stands for an empty one."""
    if mix_cfg is None:
        return {}
    if not isinstance(mix_cfg, dict):
        raise InvalidTypeError(f"mix_cfg must be dict, not {type(mix_cfg).__name__}")
    for pattern, target in mix_cfg.items():
        check_type("a key of mix_cfg", pattern, str)
        check_choice(f"mix_cfg[{pattern!r}]", target, TARGETS)
    return mix_cfg


def with_model_default(
    mix_cfg: dict[str, str], config: QuantConfig, model_type: str
) -> dict[str, str]:
    """Return the mixture with what the classic interface adds for DeepSeek-V2 and V3.

    W8A8 without a mixture quantizes the activations of the MLPs per token; in a mixture with W4A8
    what no pattern matches is W8A8.
    """
    if model_type not in _DEEPSEEK:
        return mix_cfg
    if config.model_quant_type == "W8A8" and not mix_cfg:
        return {"*.mlp.*": "w8a8_dynamic"}
    if config.model_quant_type == "W4A8_DYNAMIC" and mix_cfg:
        return {**mix_cfg, "*": mix_cfg.get("*", "w8a8")}
    return mix_cfg


def resolve_mix(
    mix_cfg: dict[str, str], config: QuantConfig, names: Sequence[str]
) -> dict[str, QuantScheme]:
    """Return the scheme of every layer that ``mix_cfg`` names.

    An exact name comes before any pattern, and an earlier pattern before a later one.

    Raises
    ------
    PatternError
        A key matches no layer.
    InvalidValueError
        A type cannot be derived from the configuration.
    """
    schemes = {target: _derive(config, target) for target in set(mix_cfg.values())}
    found = match_all("mix_cfg", list(mix_cfg), names)
    resolved: dict[str, QuantScheme] = {}
    for pattern in sorted(mix_cfg, key=lambda key: key not in names):
        for name in found[pattern]:
            resolved.setdefault(name, schemes[mix_cfg[pattern]])
    return resolved


def _derive(config: QuantConfig, target: str) -> QuantScheme:
    if config.model_quant_type.startswith("W4A4") and target not in _W4A4_PARTNERS:
        raise InvalidValueError(
            f"mix_cfg asks for {target!r}, and {config.model_quant_type} goes with "
            f"{', '.join(_W4A4_PARTNERS)} only"
        )
    if target == "float":
        return FLOAT
    try:
        # Per-group weights have set mm_tensor, which the derived configuration keeps.
        slices = config.tp_size if target == "w8a8" else None
        changes = _CHANGES[target] | {"mm_tensor": config.mm_tensor, "tp_size": slices}
        return config.derive(**changes).scheme()
    except SlimError as error:
        raise InvalidValueError(
            f"mix_cfg asks for {target!r}, which does not go with the "
            f"configuration: {error.message}"
        ) from error
