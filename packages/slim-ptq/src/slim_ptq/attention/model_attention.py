"""Caches and attention of a model in memory: measured on its samples, then emulated in place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from slim_core.errors import CalibrationError
from slim_core.logging import get_logger
from slim_ptq.attention.fa_quantizer import FAQuantizer
from slim_ptq.attention.hooking import unhook
from slim_ptq.attention.install import check_called, install_quantizers, reachable_attention
from slim_ptq.attention.ranking import hardest
from slim_ptq.calibration.samples import Sample, feed, run_sample, shortest
from slim_ptq.config import QuantConfig
from slim_ptq.kv import CacheQuantizer, CacheRanges, attach, cache_scheme, find_cache_sources
from slim_ptq.structure import find_blocks

_log = get_logger("ptq")


class ModelAttention:
    """What a configuration asks for beyond linear layers.

    Parameters
    ----------
    model : torch.nn.Module
        In floating point.
    cfg : QuantConfig
        ``use_kvcache_quant`` with ``kv_sym``, or ``use_fa_quant`` with ``fa_amp``.
    linears : mapping
        The linear layers by name.
    samples : sequence
    disabled : collection of str
        Names of attention modules that stay in floating point.

    Raises
    ------
    CalibrationError
        There are no samples.
    """

    def __init__(
        self,
        model: nn.Module,
        cfg: QuantConfig,
        linears: Mapping[str, nn.Module],
        samples: Sequence[Sample],
        disabled: Collection[str],
    ) -> None:
        self._model = model
        self._cfg = cfg
        self._linears = tuple(linears)
        self._samples = samples
        self._disabled = disabled
        self._ranges: CacheRanges | None = None
        self._heads: dict[str, FAQuantizer] = {}
        if (cfg.use_kvcache_quant or cfg.use_fa_quant) and not samples:
            what = "KV-cache" if cfg.use_kvcache_quant else "attention"
            raise CalibrationError(
                f"calib_data is empty, and {what} quantization needs samples to find its ranges"
            )

    def measure(self) -> None:
        """Run the float model on all samples and keep the ranges.

        Raises
        ------
        StructureError
            Keys and values, or the attention modules, cannot be reached.
        NumericalError
            They have NaN or infinity.
        """
        model = self._model
        if self._cfg.use_kvcache_quant:
            sources = find_cache_sources(
                model, self._linears, lambda: run_sample(model, *shortest(self._samples))
            )
            self._ranges = CacheRanges(sources)
            with self._ranges.watching(model):
                self._feed("Measuring keys and values")
        elif self._cfg.use_fa_quant:
            names = reachable_attention(model, find_blocks(model), self._disabled)
            self._heads = install_quantizers(model, names)
            for quantizer in self._heads.values():
                quantizer.observe()
            with torch.no_grad():  # what is not called is said before the long run
                run_sample(model, *shortest(self._samples))
            check_called(self._heads)
            for quantizer in self._heads.values():
                quantizer.observe()
            self._feed("Measuring attention")
            for quantizer in self._heads.values():
                quantizer.hold()  # the model goes on running, with quantized layers

    def emulate(self) -> None:
        """Let the model, whose linear layers may have been replaced, compute with the codes."""
        if self._ranges is not None:
            scheme = cache_scheme(symmetric=self._cfg.kv_sym)
            for source in self._ranges.sources:
                params = self._ranges.params(source, scheme, source.linear)
                cache = CacheQuantizer(source.part, *params, source.channels)
                attach(self._model.get_submodule(source.linear), cache)
        left_out = hardest(self._heads, self._cfg.fa_amp if self._heads else 0)
        for name, quantizer in self._heads.items():
            if name in left_out:
                _drop(self._model.get_submodule(name), quantizer)
            else:
                quantizer.emulate({part: pair[0] for part, pair in quantizer.params().items()})

    def undo(self) -> None:
        """Take every quantizer of attention away again."""
        for name, quantizer in self._heads.items():
            _drop(self._model.get_submodule(name), quantizer)
        self._heads = {}

    def _feed(self, what: str) -> None:
        for _ in feed(self._model, self._samples, what):
            pass


def _drop(module: nn.Module, quantizer: FAQuantizer) -> None:
    """Leave an attention in floating point; a quantizer that its own code calls stays idle."""
    quantizer.idle()
    if quantizer.hooked:
        unhook(module)
