"""``QuantConfig``: the configuration of the classic interface.

It holds and checks the flat parameters that msModelSlim users know, and is translated into schemes
once (:meth:`QuantConfig.scheme`); nothing behind the classic interface looks at the flags.
"""

from __future__ import annotations

import copy
from typing import Any

from slim_core.method import MethodSpec
from slim_core.scheme import QuantScheme
from slim_ptq.config_rules import check_config


class QuantConfig:
    """Parameters of post-training quantization.

    Parameters
    ----------
    w_bit, a_bit : int
        Bits of weights (4, 8, 16) and activations (4, 8, 16 = float).
    act_method : int
        Range of static activations: 1 mean of the extremes of the samples, 2 histogram,
        3 chosen for each layer.
    w_method : str
        MinMax, GPTQ, HQQ or NF.
    disable_names : list of str, optional
        Layers that stay in floating point.
    pr : float
        Probability with which a calibration activation is passed on quantized, in [0, 1].
    mm_tensor : bool
        One scale for the whole weight (True) or one for each output channel.
    dev_type : str
        cpu, npu or gpu.
    dev_id : int, optional
        Index of the device; ignored on cpu.
    fraction : float
        Share of outlier weights of sparse quantization, in [0.01, 0.1].
    nonuniform, co_sparse, do_smooth, use_sigma : bool
        Variants of sparse quantization.
    w_sym : bool
        Symmetric weights; False only with 16-bit activations.
    is_lowbit : bool
        The low-bit variants: sparse, and per-group together with ``open_outlier=False``.
    sigma_factor : float
        Threshold of sparse quantization in standard deviations, in [3, 4].
    disable_last_linear : bool
        Leave the last linear layer (the language-model head) in floating point.
    use_kvcache_quant : bool
        Quantize the KV cache to int8.
    open_outlier : bool
        False asks for per-group weights, together with ``is_lowbit``.
    is_dynamic : bool
        Per-token instead of static activations.
    group_size : int
        32, 64, 128 or 256, for per-group weights; -1 afterwards if weights are not grouped.
    percdamp : float
        Damping of GPTQ, in [0, 1].
    pdmix : bool
        Write W8A8 so that an engine can use per-token activations in prefill.

    Attributes
    ----------
    model_quant_type : str
        Type name of the model, for example ``W8A8_DYNAMIC``.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A parameter or a combination of parameters is not allowed; names it.
    """

    w_bit: int
    a_bit: int
    act_method: int
    w_method: str
    disable_names: list[str]
    pr: float
    mm_tensor: bool
    device: str
    w_sym: bool
    disable_last_linear: bool
    pdmix: bool
    is_lowbit: bool
    do_smooth: bool
    fraction: float
    nonuniform: bool
    use_sigma: bool
    sigma_factor: float
    percdamp: float
    tp_size: int | None
    enable_communication_quant: bool
    enable_per_device_quant: bool
    group_size: int
    block_size: int
    model_quant_type: str
    use_kvcache_quant: bool
    kv_sym: bool
    use_fa_quant: bool
    fa_amp: int

    def __init__(
        self,
        w_bit: int = 8,
        a_bit: int = 8,
        act_method: int = 1,
        w_method: str = "MinMax",
        disable_names: list[str] | None = None,
        pr: float = 1.0,
        mm_tensor: bool = True,
        dev_type: str = "cpu",
        dev_id: int | None = None,
        fraction: float = 0.01,
        nonuniform: bool = False,
        co_sparse: bool = False,
        w_sym: bool = True,
        is_lowbit: bool = False,
        do_smooth: bool = False,
        use_sigma: bool = False,
        sigma_factor: float = 3.0,
        disable_last_linear: bool = True,
        use_kvcache_quant: bool = False,
        open_outlier: bool = True,
        is_dynamic: bool = False,
        group_size: int = 64,
        percdamp: float = 0.01,
        pdmix: bool = False,
    ) -> None:
        given = {name: value for name, value in locals().items() if name != "self"}
        self._given: dict[str, Any] = given | {
            "kv_sym": True,
            "use_fa_quant": False,
            "fa_amp": 0,
            "tp_size": None,
            "enable_communication_quant": True,
            "enable_per_device_quant": True,
            "block_size": 64,
        }
        self._derive()

    # The builders of the classic interface: each sets parameters and checks everything again.

    def weight_quant(
        self,
        w_method: str = "MinMax",
        mm_tensor: bool = True,
        w_sym: bool = True,
        group_size: int = 64,
        block_size: int = 64,
    ) -> QuantConfig:
        """Set the parameters of weight-only quantization."""
        return self._with(
            w_method=w_method,
            mm_tensor=mm_tensor,
            w_sym=w_sym,
            group_size=group_size,
            block_size=block_size,
        )

    def weight_activation_quant(
        self, act_method: int = 1, pr: float = 1.0, is_dynamic: bool = False
    ) -> QuantConfig:
        """Set the parameters of W8A8."""
        return self._with(act_method=act_method, pr=pr, is_dynamic=is_dynamic)

    def sparse_quant(
        self,
        act_method: int = 1,
        fraction: float = 0.01,
        nonuniform: bool = False,
        is_lowbit: bool = False,
        do_smooth: bool = False,
        use_sigma: bool = False,
        sigma_factor: float = 3.0,
    ) -> QuantConfig:
        """Set the parameters of sparse quantization."""
        return self._with(
            act_method=act_method,
            fraction=fraction,
            nonuniform=nonuniform,
            co_sparse=True,
            is_lowbit=is_lowbit,
            do_smooth=do_smooth,
            use_sigma=use_sigma,
            sigma_factor=sigma_factor,
        )

    def kv_quant(self, kv_sym: bool = True) -> QuantConfig:
        """Quantize the KV cache."""
        return self._with(use_kvcache_quant=True, kv_sym=kv_sym)

    def fa_quant(self, fa_amp: int = 0) -> QuantConfig:
        """Quantize the inputs of attention."""
        return self._with(use_fa_quant=True, fa_amp=fa_amp)

    def simulate_tp(
        self,
        tp_size: int,
        enable_communication_quant: bool = True,
        enable_per_device_quant: bool = True,
    ) -> QuantConfig:
        """Quantize row-parallel layers as so many devices will hold them; W8A8 only.

        Parameters
        ----------
        tp_size : int
            2, 4, 8 or 16 devices, each with its slice of the input channels.
        enable_communication_quant : bool
            Round what the devices exchange to int8.
        enable_per_device_quant : bool
            With scales of its own for each device.
        """
        return self._with(
            tp_size=tp_size,
            enable_communication_quant=enable_communication_quant,
            enable_per_device_quant=enable_per_device_quant,
        )

    @property
    def is_per_group(self) -> bool:
        """Whether weights have one scale for each group of input channels."""
        return self.group_size > 0

    def scheme(self) -> QuantScheme:
        """Return the scheme of a layer that is quantized as the model is."""
        from slim_ptq.config_rules import scheme_of

        return scheme_of(self)

    def method(self, scheme: QuantScheme) -> MethodSpec:
        """Return the method with which a layer of this scheme is quantized."""
        from slim_ptq.config_rules import method_of

        return method_of(self, scheme)

    def derive(self, **changes: Any) -> QuantConfig:
        """Return a checked copy with other parameters."""
        twin = copy.copy(self)
        twin._given = dict(self._given)
        return twin._with(**changes)

    def _with(self, **changes: Any) -> QuantConfig:
        before = self._given
        self._given = before | changes
        try:
            self._derive()
        except Exception:
            self._given = before
            raise
        return self

    def _derive(self) -> None:
        """Check the given parameters and set every attribute from scratch."""
        self.__dict__.update(check_config(dict(self._given)))
