"""The structure of Hugging Face decoders, found by shapes and data flow instead of name tables."""

from slim_ptq.structure.blocks import find_blocks
from slim_ptq.structure.calls import cache_argument, named_sample
from slim_ptq.structure.experts import (
    UnfusedExperts,
    find_fused_experts,
    fused_state_dict,
    unfuse_experts,
)
from slim_ptq.structure.linears import as_linear, bias_of, is_linear, weight_of
from slim_ptq.structure.links import Link, LinkKind, NormForm, RejectedLink, Target
from slim_ptq.structure.names import checkpoint_names
from slim_ptq.structure.quantizable import find_linears, find_routers, is_router
from slim_ptq.structure.replace import replaced
from slim_ptq.structure.trace import BlockTrace, trace_block

__all__ = [
    "BlockTrace",
    "Link",
    "LinkKind",
    "NormForm",
    "RejectedLink",
    "Target",
    "UnfusedExperts",
    "as_linear",
    "bias_of",
    "cache_argument",
    "checkpoint_names",
    "find_blocks",
    "find_fused_experts",
    "find_linears",
    "find_routers",
    "fused_state_dict",
    "is_linear",
    "is_router",
    "named_sample",
    "replaced",
    "trace_block",
    "unfuse_experts",
    "weight_of",
]
