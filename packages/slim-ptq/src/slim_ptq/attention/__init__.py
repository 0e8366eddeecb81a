"""Int8 attention (FAQuant): scales of queries, keys and values by head, and their emulation."""

from slim_ptq.attention.fa_quantizer import FAQuantizer, Mode
from slim_ptq.attention.install import (
    attention_modules,
    check_called,
    find_quantizers,
    install_quantizers,
    reachable_attention,
)

__all__ = [
    "FAQuantizer",
    "Mode",
    "attention_modules",
    "check_called",
    "find_quantizers",
    "install_quantizers",
    "reachable_attention",
]
