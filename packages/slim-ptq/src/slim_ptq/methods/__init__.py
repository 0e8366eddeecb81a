"""Methods that turn a float weight into codes, each a pure function in a file of its own."""

from slim_ptq.methods.base import (
    BatchInputs,
    BatchMethod,
    LayerInputs,
    Needs,
    Parts,
    WeightMethod,
)
from slim_ptq.methods.flatquant import FlatQuant
from slim_ptq.methods.learned import LearnedTransform
from slim_ptq.methods.minmax import MinMax, quantize_minmax, relative_error
from slim_ptq.methods.registry import METHODS, PtqMethods, make_method
from slim_ptq.methods.signround import SignRound

__all__ = [
    "METHODS",
    "BatchInputs",
    "BatchMethod",
    "FlatQuant",
    "LayerInputs",
    "LearnedTransform",
    "MinMax",
    "Needs",
    "Parts",
    "PtqMethods",
    "SignRound",
    "WeightMethod",
    "make_method",
    "quantize_minmax",
    "relative_error",
]
