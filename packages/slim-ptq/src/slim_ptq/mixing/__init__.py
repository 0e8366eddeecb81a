"""Calibration sets mixed from several data sets (classic interface)."""

from slim_ptq.mixing.processors import BUILT_IN, DatasetProcessorBase, QuestionProcessor
from slim_ptq.mixing.sets import CalibrationData, read_mixture

__all__ = [
    "BUILT_IN",
    "CalibrationData",
    "DatasetProcessorBase",
    "QuestionProcessor",
    "read_mixture",
]
