"""``AntiOutlierConfig``: parameters of outlier suppression in the classic interface."""

from __future__ import annotations

from slim_core.dtypes import IntType
from slim_core.errors import InvalidValueError
from slim_core.logging import get_logger
from slim_core.scheme import (
    PER_TOKEN_INT8,
    STATIC_INT8,
    Granularity,
    QuantScheme,
    TensorScheme,
)
from slim_core.validate import (
    check_choice,
    check_float,
    check_int,
    check_str_list,
    check_type,
    did_you_mean,
)
from slim_ptq.devices import torch_device
from slim_ptq.transforms import (
    AwqScale,
    CbqSmooth,
    FlexSmooth,
    IterativeSmooth,
    ScaleMethod,
    SmoothQuant,
    ThresholdSmooth,
)

_log = get_logger("ptq.anti_outlier")

METHODS = ("m1", "m2", "m3", "m4", "m5", "m6")
DEVICE_TYPES = ("cpu", "npu", "gpu")
FLEX_KEYS = ("alpha", "beta")


class AntiOutlierConfig:
    """Parameters of outlier suppression.

    Parameters
    ----------
    w_bit : int
        Bits of the weights, 4 or 8.
    a_bit : int
        Bits of the activations, 8, or 16 with method m3.
    anti_method : str
        ``m1`` SmoothQuant; ``m2`` only the channels above a searched threshold; ``m3`` AWQ, for
        weights alone or sparse weights; ``m4`` a strong SmoothQuant, also between linear layers;
        ``m5`` only detected outlier channels; ``m6`` searched shares of activation and weight,
        also between linear layers.
    dev_type : str
        cpu, npu or gpu.
    dev_id : int, optional
        Index of the device; ignored on cpu.
    w_sym : bool
        Symmetric weights; False only with m3.
    disable_anti_names : list of str, optional
        Names or patterns of linear layers; a link with one of them is left alone.
    flex_config : dict, optional
        ``alpha`` and ``beta`` of m6, each None or in [0, 1]; searched unless both are given.
    shift : bool
        With m4: also move the middle of each channel out of norms.  The layers behind fold it into
        their integer bias, so it needs static activations, or layers that have a bias.
    is_dynamic : bool
        Activations will be quantized per token, which the searches of m2, m3 and m6 mind.
    group_size : int
        Weights will be quantized in groups of so many input channels; 0 for whole rows.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A parameter or a combination of parameters is not allowed; names it.
    """

    def __init__(
        self,
        w_bit: int = 8,
        a_bit: int = 8,
        anti_method: str = "m2",
        dev_type: str = "cpu",
        dev_id: int | None = None,
        w_sym: bool = True,
        disable_anti_names: list[str] | None = None,
        flex_config: dict[str, float | None] | None = None,
        *,
        shift: bool = False,
        is_dynamic: bool = False,
        group_size: int = 0,
    ) -> None:
        self.w_bit = check_choice("w_bit", check_int("w_bit", w_bit), (4, 8))
        self.a_bit = check_choice("a_bit", check_int("a_bit", a_bit), (8, 16))
        self.anti_method = check_choice("anti_method", anti_method, METHODS)
        self.w_sym = check_type("w_sym", w_sym, bool)
        for text, given in (("a_bit=16", self.a_bit == 16), ("w_sym=False", not self.w_sym)):
            if given and anti_method != "m3":
                raise InvalidValueError(
                    f"{text} goes with anti_method 'm3' only, not {anti_method!r}"
                )
        names = [] if disable_anti_names is None else disable_anti_names
        self.disable_anti_names = check_str_list("disable_anti_names", names)
        self.flex_config = _check_flex(flex_config)
        self.shift = check_type("shift", shift, bool)
        if shift and anti_method != "m4":
            raise InvalidValueError(f"shift goes with anti_method 'm4' only, not {anti_method!r}")
        self.is_dynamic = check_type("is_dynamic", is_dynamic, bool)
        self.group_size = check_int("group_size", group_size, low=0)
        if is_dynamic and self.a_bit == 16:
            raise InvalidValueError("is_dynamic goes with a_bit=8: of 16 bits nothing is quantized")
        self.dev_type = check_choice("dev_type", dev_type, DEVICE_TYPES)
        self.dev_id, self.device = _device(self.dev_type, dev_id)

    def method(self) -> ScaleMethod:
        """Return the method that the parameters stand for."""
        methods: dict[str, ScaleMethod] = {
            "m1": SmoothQuant(),
            "m2": ThresholdSmooth(),
            "m3": AwqScale(),
            "m4": IterativeSmooth(shift=self.shift),
            "m5": CbqSmooth(),
            "m6": FlexSmooth(self.flex_config["alpha"], self.flex_config["beta"]),
        }
        return methods[self.anti_method]

    def scheme(self) -> QuantScheme:
        """Return how layers will be quantized, as far as the parameters say.

        4-bit weights with static 8-bit activations are sparse ones, as in ``QuantConfig``.
        """
        if self.w_bit == 4 and self.a_bit == 8 and not self.is_dynamic:
            return QuantScheme.parse("w8a8s")
        grouped = Granularity.PER_GROUP if self.group_size else Granularity.PER_CHANNEL
        weight = TensorScheme(IntType(self.w_bit), grouped, self.w_sym, self.group_size)
        activation = PER_TOKEN_INT8 if self.is_dynamic else STATIC_INT8
        return QuantScheme(weight, activation if self.a_bit == 8 else None)


def _check_flex(value: dict[str, float | None] | None) -> dict[str, float | None]:
    given = {} if value is None else check_type("flex_config", value, dict)
    for key, item in given.items():
        if key not in FLEX_KEYS:
            raise InvalidValueError(
                f"flex_config has an unknown key {key!r}; known are {', '.join(FLEX_KEYS)}",
                hint=did_you_mean(key, FLEX_KEYS),
            )
        if item is not None:
            check_float(f"flex_config[{key!r}]", item, low=0.0, high=1.0)
    return {key: given.get(key) for key in FLEX_KEYS}


def _device(kind: str, index: int | None) -> tuple[int | None, str]:
    if index is not None:
        check_int("dev_id", index, low=0)
    if kind == "cpu":
        if index is not None:
            _log.warning("dev_id %s is ignored on cpu", index)
        return None, "cpu"
    name = "cuda" if kind == "gpu" else kind
    device = name if index is None else f"{name}:{index}"
    torch_device(device)
    return index, device
