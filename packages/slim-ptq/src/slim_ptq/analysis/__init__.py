"""Which layers are sensitive to quantization."""

from slim_ptq.analysis.ranking import Analysis, Metric, Sensitivity
from slim_ptq.analysis.run import analyze

__all__ = ["Analysis", "Metric", "Sensitivity", "analyze"]
