"""The smallest set of layers that must stay accurate for a model to meet a target."""

from slim_ptq.tuning.run import tune
from slim_ptq.tuning.target import Target
from slim_ptq.tuning.trials import Trial, Tuned

__all__ = ["Target", "Trial", "Tuned", "tune"]
