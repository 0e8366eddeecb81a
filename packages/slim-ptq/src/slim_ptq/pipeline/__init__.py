"""The two ways through a model: weights only, and block by block with calibration data."""

from slim_ptq.pipeline.blockwise import check_alone, run_blockwise
from slim_ptq.pipeline.fallback_plan import plan_with_fallback
from slim_ptq.pipeline.weights_only import run_weights_only

__all__ = ["check_alone", "plan_with_fallback", "run_blockwise", "run_weights_only"]
