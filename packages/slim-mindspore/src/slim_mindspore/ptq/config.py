"""``PTQConfig`` and what it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from enum import Enum
from typing import Any

from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_mindspore.framework import ms
from slim_mindspore.layer_policy import LayerPolicy
from slim_mindspore.quantization_config import QuantizationConfig


class PTQMode(Enum):
    """Whether a network is quantized, or prepared for a checkpoint that was."""

    QUANTIZE = "quantize"
    DEPLOY = "deploy"


class BackendTarget(Enum):
    """For what a network is made; every device gets the same cells."""

    NONE = "none"
    ASCEND = "ascend"


class OutliersSuppressionType(Enum):
    """What is done about outliers of activations; the last two are known by name only."""

    NONE = "none"
    SMOOTH = "smooth"
    AWQ = "awq"
    OUTLIER_SUPPRESSION_PLUS = "outlier-suppression+"
    OUTLIER_SUPPRESSION_LITE = "outlier-suppression-lite"


class PrecisionRecovery(Enum):
    """What makes up for the rounding of weights."""

    NONE = "none"
    GPTQ = "gptq"


class QuantGranularity(Enum):
    """What shares a scale."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"
    PER_TOKEN = "per_token"
    PER_GROUP = "per_group"


@dataclass
class SmoothQuantConfig:
    """Options of smoothing, see :class:`slim_mindspore.algorithm_args.SmoothArgs`."""

    alpha: float = 0.5


@dataclass
class GPTQQuantConfig:
    """Options of GPTQ, see :class:`slim_mindspore.algorithm_args.GptqArgs`."""

    block_size: int = 128
    desc_act: bool = False
    damp_percent: float = 0.01
    static_groups: bool = False


@dataclass
class AWQConfig:
    """Options of AWQ, see :class:`slim_mindspore.algorithm_args.AwqArgs`."""

    duo_scaling: bool = True
    smooth_alpha: list[float] | float = field(default_factory=lambda: [i / 20 for i in range(20)])
    weight_clip_ratio: list[float] | float = field(
        default_factory=lambda: [1 - i / 20 for i in range(10)]
    )


@dataclass
class PTQConfig:
    """How a network is quantized.

    Parameters
    ----------
    mode : PTQMode
    backend : BackendTarget
    opname_blacklist : list of str
        A cell whose name contains one of these stays in floating point.
    algo_args : dict or dataclass
        Options of the algorithm: one of the classes above, or their fields.
    weight_quant_dtype : mindspore dtype or None
        ``int8``, ``qint4x2``.
    kvcache_quant_dtype, act_quant_dtype : mindspore dtype or None
        ``int8``.
    precision_recovery : PrecisionRecovery
    outliers_suppression : OutliersSuppressionType
    weight_quant_granularity, kvcache_quant_granularity, act_quant_granularity : QuantGranularity
    group_size : int
        With granularity PER_GROUP; 0 otherwise.

    Raises
    ------
    InvalidTypeError, InvalidValueError, RecipeError
        A field has the wrong type or value, or fields contradict each other.
    """

    mode: PTQMode = PTQMode.QUANTIZE
    backend: BackendTarget = BackendTarget.ASCEND
    opname_blacklist: list[str] = field(default_factory=list)
    algo_args: Any = field(default_factory=dict)
    weight_quant_dtype: Any = ms.int8
    kvcache_quant_dtype: Any = None
    act_quant_dtype: Any = None
    precision_recovery: PrecisionRecovery = PrecisionRecovery.NONE
    outliers_suppression: OutliersSuppressionType = OutliersSuppressionType.NONE
    weight_quant_granularity: QuantGranularity = QuantGranularity.PER_CHANNEL
    kvcache_quant_granularity: QuantGranularity = QuantGranularity.PER_CHANNEL
    act_quant_granularity: QuantGranularity = QuantGranularity.PER_TENSOR
    group_size: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("mode", PTQMode), ("backend", BackendTarget)):
            if not isinstance(getattr(self, name), kind):
                raise InvalidValueError(f"{name} must be a {kind.__name__}")
        for name in ("weight", "kvcache", "act"):
            if not isinstance(getattr(self, f"{name}_quant_granularity"), QuantGranularity):
                raise InvalidValueError(f"{name}_quant_granularity must be a QuantGranularity")
        if not isinstance(self.precision_recovery, PrecisionRecovery):
            raise InvalidTypeError("precision_recovery must be a PrecisionRecovery")
        if not isinstance(self.outliers_suppression, OutliersSuppressionType):
            raise InvalidTypeError("outliers_suppression must be an OutliersSuppressionType")
        names = self.opname_blacklist
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            raise InvalidTypeError("opname_blacklist must be a list of str")
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int):
            raise InvalidTypeError("group_size must be int")
        self.policy()
        self.cache()

    def policy(self) -> LayerPolicy:
        """Return what holds for a linear cell."""
        return LayerPolicy.from_dict(self._policy_values(), "PTQConfig")

    def cache(self) -> dict[str, Any]:
        """Return the keys of a ``quantization_config`` that concern the cache."""
        kind = _dtype_name("kvcache_quant_dtype", self.kvcache_quant_dtype, ("int8",))
        granularity = self.kvcache_quant_granularity
        if kind is None and granularity is QuantGranularity.PER_TOKEN:
            raise InvalidValueError(
                "kvcache_quant_granularity PER_TOKEN needs kvcache_quant_dtype int8"
            )
        return {"kvcache_dtype": kind, "kvcache_quant_granularity": granularity.value}

    def whole(
        self, method: str, layer_policies: Mapping[str, PTQConfig | None]
    ) -> QuantizationConfig:
        """Return the ``quantization_config`` that says the same.

        Parameters
        ----------
        method : str
            ``rtn``, ``smooth_quant`` or ``ptq``.
        layer_policies : mapping of str to PTQConfig or None
            By regular expressions; None leaves cells in floating point.
        """
        policies = {
            pattern: {} if policy is None else policy._policy_values()
            for pattern, policy in layer_policies.items()
        }
        values = self._policy_values() | self.cache()
        return QuantizationConfig.from_dict(
            values
            | {
                "quant_method": method,
                "modules_to_not_convert": tuple(self.opname_blacklist),
                "layer_policies": policies,
            },
            "PTQConfig",
        )

    def _policy_values(self) -> dict[str, Any]:
        options = self.algo_args
        if is_dataclass(options) and not isinstance(options, type):
            options = asdict(options)
        if not isinstance(options, dict):
            raise InvalidValueError(
                f"algo_args must be a dict or a dataclass, not {type(options).__name__}"
            )
        return {
            "weight_dtype": _dtype_name(
                "weight_quant_dtype", self.weight_quant_dtype, ("int8", "int4")
            ),
            "activation_dtype": _dtype_name("act_quant_dtype", self.act_quant_dtype, ("int8",)),
            "outliers_suppression": self.outliers_suppression.value,
            "precision_recovery": self.precision_recovery.value,
            "weight_quant_granularity": self.weight_quant_granularity.value,
            "act_quant_granularity": self.act_quant_granularity.value,
            "group_size": self.group_size,
            "algorithm_args": options,
        }


def _dtype_name(name: str, dtype: Any, allowed: tuple[str, ...]) -> str | None:
    """Return the name of a MindSpore dtype in a ``quantization_config``."""
    if dtype is None:
        return None
    found = {ms.int8: "int8", ms.qint4x2: "int4"}.get(dtype)
    if found not in allowed:
        known = ", ".join("qint4x2" if item == "int4" else item for item in allowed)
        raise InvalidValueError(f"{name} must be {known} of mindspore or None, not {dtype!r}")
    return found
