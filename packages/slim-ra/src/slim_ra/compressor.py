"""The two compressors under their established names."""

from __future__ import annotations

from typing import Any

from torch import nn

from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_core.logging import get_logger
from slim_core.validate import check_type
from slim_ra.config import RACompressConfig, RARopeCompressConfig
from slim_ra.geometry import HeadGeometry, head_geometry, text_config
from slim_ra.profile import write_profile
from slim_ra.savepath import check_save_path
from slim_ra.scores import HeadScores, search_heads
from slim_ra.select import select_heads
from slim_ra.windows import legacy_windows

_log = get_logger("ra")


class RACompressor:
    """Finds the windows of an ALiBi model and writes them to a ``win.pt``.

    Parameters
    ----------
    model : nn.Module
        Loaded in floating point.
    cfg : RACompressConfig

    Raises
    ------
    InvalidTypeError
        An argument of another type.
    InvalidValueError
        A model without configuration, or with one that does not tell sizes and heads.
    """

    def __init__(self, model: nn.Module, cfg: RACompressConfig) -> None:
        self.model = check_type("model", model, nn.Module)
        self.cfg = check_type("cfg", cfg, RACompressConfig)
        geometry = _checked_geometry(model)
        self.hidden_size = geometry.hidden_size
        self.head_dim = geometry.hidden_size // geometry.heads
        if not 1 <= self.head_dim <= 1000:
            raise InvalidValueError(f"head_dim must be in [1, 1000], not {self.head_dim}")

    def get_alibi_windows(self, save_path: str) -> None:
        """Write one int64 tensor ``[num_attention_heads]``, mode 0400, to ``save_path``.

        See :func:`slim_ra.windows.legacy_windows` for the formula and
        :func:`slim_ra.savepath.check_save_path` for the rules of the path.
        """
        path = check_save_path(save_path)
        write_profile(path, legacy_windows(self.model, self.cfg))
        _log.info("ALiBi windows saved to %s", path)


class RARopeCompressor:
    """Finds the KV heads of a RoPE model that must keep their history; writes a ``win.pt``.

    Parameters
    ----------
    model : nn.Module
    tokenizer : PreTrainedTokenizerBase
    cfg : RARopeCompressConfig

    Raises
    ------
    InvalidTypeError
        An argument of another type.
    InvalidValueError
        A model without configuration, or with one that does not tell sizes and heads.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, cfg: RARopeCompressConfig) -> None:
        from transformers import PreTrainedTokenizerBase

        self.model = check_type("model", model, nn.Module)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise InvalidTypeError(
                f"tokenizer must be PreTrainedTokenizerBase, not {type(tokenizer).__name__}"
            )
        self.tokenizer = tokenizer
        self.cfg = check_type("cfg", cfg, RARopeCompressConfig)
        geometry = _checked_geometry(model)
        self.hidden_size = geometry.hidden_size
        self.num_attention_heads = geometry.heads
        self.num_key_value_heads = geometry.kv_heads
        self.num_kv_per_group = geometry.group

    def get_attention_score(self) -> HeadScores:
        """Score every KV head, see :func:`slim_ra.scores.search_heads`."""
        return search_heads(self.model, self.tokenizer)

    def get_compress_heads(self, save_path: str) -> None:
        """Write the retrieval heads as a dict, mode 0640, to ``save_path``.

        See :mod:`slim_ra.profile` for the format and :func:`slim_ra.savepath.check_save_path` for
        the rules of the path.
        """
        path = check_save_path(save_path)
        heads = select_heads(
            self.get_attention_score(),
            induction_ratio=self.cfg.induction_head_ratio,
            echo_ratio=self.cfg.echo_head_ratio,
        )
        write_profile(path, heads)
        _log.info("retrieval heads saved to %s", path)


def _checked_geometry(model: nn.Module) -> HeadGeometry:
    if getattr(model, "config", None) is None:
        raise InvalidValueError("Model does not have attribute `config`")
    config = text_config(model.config)
    if not getattr(config, "hidden_size", None):
        raise InvalidValueError(
            "Model must have a `config` attribute with a `hidden_size` property"
        )
    names = ("num_attention_heads", "n_head", "n_heads", "num_heads")
    if not any(getattr(config, name, None) for name in names):
        raise InvalidValueError(
            "Model must have a `config` attribute with a `num_attention_heads` property"
        )
    return head_geometry(config)
