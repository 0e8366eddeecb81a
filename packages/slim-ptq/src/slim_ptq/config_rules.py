"""The rules between the parameters of :class:`~slim_ptq.config.QuantConfig`, in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_core.logging import get_logger
from slim_core.method import MINMAX, MethodSpec
from slim_core.scheme import FLOAT, QuantScheme, Variant
from slim_core.validate import check_choice, check_float, check_int, check_str_list, check_type
from slim_ptq.devices import torch_device

if TYPE_CHECKING:
    from slim_ptq.config import QuantConfig

_log = get_logger("ptq")

DEVICE_TYPES = ("cpu", "npu", "gpu")
WEIGHT_METHODS = ("MinMax", "GPTQ", "HQQ", "NF")
GROUP_SIZES = (32, 64, 128, 256)
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
TP_SIZES = (2, 4, 8, 16)

Values = dict[str, Any]


def check_config(values: Values) -> Values:
    """Return the attributes of a configuration for its given parameters.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        The first rule that is broken.
    """
    _check_device(values)
    _check_basics(values)
    _check_caches(values)
    _check_sparse(values)
    _check_dynamic(values)
    _settle_groups(values)
    _settle_smoothing(values)
    _check_nf(values)
    _check_four_bits(values)
    values["model_quant_type"] = kind = _quant_type(values)
    if kind in ("W8A8", "W8A8S") and values["w_method"] != "MinMax":
        raise InvalidValueError(f"w_method must be 'MinMax' for {kind}, not {values['w_method']!r}")
    for name in ("pdmix", "tp_size"):
        if values[name] and kind != "W8A8":
            raise InvalidValueError(f"{name} goes with W8A8 only, not with {kind}")
    if values["pdmix"] and values["tp_size"]:
        raise InvalidValueError("pdmix does not go with tp_size")
    values["w_signed"] = values["a_signed"] = True
    values["w_hessian"] = values["w_method"] == "GPTQ"
    values["hqq"] = values["w_method"] == "HQQ"
    return values


def scheme_of(config: QuantConfig) -> QuantScheme:
    """Return the scheme of a configuration."""
    kind = "W8A8_MIX" if config.pdmix else config.model_quant_type
    text = kind.lower()
    if kind == "FLOAT":
        return FLOAT
    if kind == "W4A4_FLATQUANT_DYNAMIC":  # always one scale for each output channel
        return QuantScheme.parse(text)
    if kind == "NF4":
        return QuantScheme.parse(f"{text}_b{config.block_size}")
    if config.is_per_group:
        text += f"_g{config.group_size}"
    elif config.mm_tensor:
        text += "_tensor"
    return QuantScheme.parse(text if config.w_sym else f"{text}_asym")


def method_of(config: QuantConfig, scheme: QuantScheme) -> MethodSpec:
    """Return the method with which a layer of a scheme is quantized.

    ``w_method`` is that of layers of the type of the configuration; others, which ``mix_cfg``
    names, are rounded to nearest unless they are weight-only too.
    """
    if scheme.variant is Variant.FLATQUANT:
        return MethodSpec("flatquant")
    if scheme.variant is not Variant.SPARSE:
        if config.w_method == "GPTQ" and not scheme.is_static:
            return MethodSpec("gptq", (("damp", config.percdamp),))
        if config.w_method == "HQQ" and not scheme.is_static:
            return MethodSpec("hqq")
        return MINMAX
    options: dict[str, Any] = {"scope": "row" if config.is_lowbit else "tensor"}
    if config.is_lowbit and config.use_sigma:
        options["sigma_factor"] = config.sigma_factor
    else:
        options["fraction"] = config.fraction
    if config.nonuniform:
        options["nonuniform"] = True
    return MethodSpec.parse({"name": "sparse", **options})


def _check_device(values: Values) -> None:
    kind = check_choice("dev_type", values["dev_type"], DEVICE_TYPES)
    index = values["dev_id"]
    if index is not None:
        check_int("dev_id", index, low=0)
    if kind == "cpu":
        if index is not None:
            _log.warning("dev_id %s is ignored on cpu", index)
        values["dev_id"] = None
        values["device"] = "cpu"
        return
    name = "cuda" if kind == "gpu" else kind
    values["device"] = name if index is None else f"{name}:{index}"
    torch_device(values["device"])


def _check_basics(values: Values) -> None:
    check_int("w_bit", values["w_bit"])
    check_int("a_bit", values["a_bit"])
    check_int("act_method", values["act_method"], low=1, high=3)
    check_type("w_method", values["w_method"], str)
    names = values["disable_names"]
    values["disable_names"] = [] if names is None else check_str_list("disable_names", names)
    for name in (
        "mm_tensor",
        "co_sparse",
        "w_sym",
        "is_lowbit",
        "disable_last_linear",
        "use_kvcache_quant",
        "open_outlier",
        "is_dynamic",
        "pdmix",
        "nonuniform",
        "do_smooth",
        "use_sigma",
    ):
        check_type(name, values[name], bool)
    if values["a_bit"] == 8 and not values["w_sym"]:
        raise InvalidTypeError("w_sym must be True for 8-bit activations (a_bit = 8)")
    values["percdamp"] = check_float("percdamp", values["percdamp"], low=0, high=1)
    check_choice("w_method", values["w_method"], WEIGHT_METHODS)
    check_choice("block_size", values["block_size"], BLOCK_SIZES)


def _check_caches(values: Values) -> None:
    if values["use_kvcache_quant"] and values["use_fa_quant"]:
        raise InvalidValueError("KV-cache and attention quantization exclude each other")
    if "kv_sym" in values:
        check_type("kv_sym", values["kv_sym"], bool)
    if "fa_amp" in values:
        check_int("fa_amp", values["fa_amp"], low=0)
    if values["tp_size"] is not None:
        check_choice("tp_size", values["tp_size"], TP_SIZES)
    for name in ("enable_communication_quant", "enable_per_device_quant"):
        check_type(name, values[name], bool)


def _check_sparse(values: Values) -> None:
    values["fraction"] = check_float("fraction", values["fraction"], low=0.01, high=0.1)
    values["sigma_factor"] = check_float("sigma_factor", values["sigma_factor"], low=3, high=4)
    if values["is_lowbit"]:
        values["co_sparse"] = False
        if values["w_bit"] == 4:
            check_choice("a_bit", values["a_bit"], (8, 16))
        if values["act_method"] == 3:
            raise InvalidValueError("act_method must be 1 or 2 with is_lowbit, not 3")
    if values["co_sparse"]:
        for name, forced in (("pr", 1.0), ("w_bit", 4), ("a_bit", 8)):
            if values[name] != forced:
                _log.warning("co_sparse sets %s to %s (was %s)", name, forced, values[name])
            values[name] = forced
    values["pr"] = check_float("pr", values["pr"], low=0, high=1)


def _check_dynamic(values: Values) -> None:
    if values["is_dynamic"]:
        check_choice("w_bit with is_dynamic", values["w_bit"], (4, 8))
        check_choice("a_bit with is_dynamic", values["a_bit"], (4, 8))


def _settle_groups(values: Values) -> None:
    bits = (values["w_bit"], values["a_bit"])
    grouped = (
        values["is_lowbit"] and not values["open_outlier"] and (bits[1] == 16 or bits == (4, 8))
    )
    if grouped:
        check_choice("group_size", values["group_size"], GROUP_SIZES)
        values["mm_tensor"] = values["do_smooth"] = False
        return
    values["group_size"] = -1
    if values["is_lowbit"] and values["w_method"] in ("HQQ", "GPTQ"):
        raise InvalidValueError(
            f"w_method {values['w_method']} with is_lowbit needs per-group weights",
            hint="set open_outlier=False and a_bit=16",
        )


def _settle_smoothing(values: Values) -> None:
    if values["do_smooth"] and not values["is_lowbit"]:
        _log.warning("do_smooth goes with is_lowbit and is not used; use AntiOutlier instead")
        values["do_smooth"] = False


def _check_nf(values: Values) -> None:
    if values["w_method"] != "NF":
        return
    check_choice("w_bit with w_method 'NF'", values["w_bit"], (4,))
    check_choice("a_bit with w_method 'NF'", values["a_bit"], (16,))
    for name in ("is_lowbit", "use_fa_quant", "use_kvcache_quant", "tp_size"):
        if values[name]:
            raise InvalidValueError(f"w_method 'NF' does not go with {name}")


def _check_four_bits(values: Values) -> None:
    bits = (values["w_bit"], values["a_bit"])
    grouped = values["group_size"] > 0
    sparse = values["co_sparse"] or (
        values["is_lowbit"] and not grouped and not values["is_dynamic"]
    )
    values["a_sym"] = values["is_stage_quant"] = False
    if bits == (4, 8) and not sparse:
        if not (grouped and values["is_dynamic"]):
            raise InvalidTypeError(
                "w_bit = 4 with a_bit = 8 must be sparse (co_sparse, is_lowbit), or per-group and "
                "dynamic (is_lowbit=True, open_outlier=False, is_dynamic=True)"
            )
        if not values["w_sym"]:
            raise InvalidTypeError("w_sym must be True for w_bit = 4 with a_bit = 8")
        values["a_sym"] = values["is_stage_quant"] = True
    if bits == (4, 4):
        needed = {
            "is_dynamic": True,
            "w_method": "MinMax",
            "w_sym": True,
            "disable_last_linear": True,
        }
        for name, value in needed.items():
            if values[name] != value:
                raise InvalidValueError(
                    f"{name} must be {value!r} for w_bit = 4 with a_bit = 4, not {values[name]!r}"
                )


def _quant_type(values: Values) -> str:
    bits = (values["w_bit"], values["a_bit"])
    if values["is_dynamic"]:
        kinds = {(8, 8): "W8A8_DYNAMIC", (4, 8): "W4A8_DYNAMIC", (4, 4): "W4A4_FLATQUANT_DYNAMIC"}
    elif values["co_sparse"]:
        return "W8A8S"
    else:
        kinds = {
            (8, 8): "W8A8",
            (8, 16): "W8A16",
            (4, 16): "NF4" if values["w_method"] == "NF" else "W4A16",
            (16, 16): "FLOAT",
        }
        if values["is_lowbit"]:
            kinds[4, 8] = "W8A8S"
    if bits not in kinds:
        flag = " with is_dynamic" if values["is_dynamic"] else ""
        listed = ", ".join(f"({w}, {a})" for w, a in kinds)
        raise InvalidValueError(
            f"(w_bit, a_bit) = {bits}{flag} is no known type; known are {listed}"
        )
    return kinds[bits]
