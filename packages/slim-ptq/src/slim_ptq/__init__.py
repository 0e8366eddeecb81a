"""Post-training quantization of Hugging Face language models.

Two interfaces to the same machinery: :func:`quantize`, from a model directory to a quantized one,
and the classic ``QuantConfig`` / ``Calibrator`` / ``AntiOutlier`` on a model in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slim_ptq.__about__ import __version__

if TYPE_CHECKING:
    from slim_ptq.analysis import analyze
    from slim_ptq.anti_outlier import AntiOutlier, AntiOutlierConfig
    from slim_ptq.api import quantize
    from slim_ptq.attention import FAQuantizer
    from slim_ptq.calibrator import Calibrator
    from slim_ptq.config import QuantConfig
    from slim_ptq.dequantizing import dequantize
    from slim_ptq.fake_quantize import FakeQuantizeCalibrator
    from slim_ptq.layer_select import LayerSelector
    from slim_ptq.load import load_model
    from slim_ptq.mixing import CalibrationData, DatasetProcessorBase
    from slim_ptq.precision import PrecisionTest, evaluate_task
    from slim_ptq.quality import evaluate_text
    from slim_ptq.tuning import tune

# Imported on first use, so that the command line can print its help without torch.
_HOMES = {
    "AntiOutlier": "slim_ptq.anti_outlier",
    "AntiOutlierConfig": "slim_ptq.anti_outlier",
    "FAQuantizer": "slim_ptq.attention",
    "CalibrationData": "slim_ptq.mixing",
    "Calibrator": "slim_ptq.calibrator",
    "DatasetProcessorBase": "slim_ptq.mixing",
    "FakeQuantizeCalibrator": "slim_ptq.fake_quantize",
    "LayerSelector": "slim_ptq.layer_select",
    "PrecisionTest": "slim_ptq.precision",
    "QuantConfig": "slim_ptq.config",
    "analyze": "slim_ptq.analysis",
    "dequantize": "slim_ptq.dequantizing",
    "evaluate_task": "slim_ptq.precision",
    "evaluate_text": "slim_ptq.quality",
    "load_model": "slim_ptq.load",
    "quantize": "slim_ptq.api",
    "tune": "slim_ptq.tuning",
}

__all__ = [
    "AntiOutlier",
    "AntiOutlierConfig",
    "CalibrationData",
    "Calibrator",
    "DatasetProcessorBase",
    "FAQuantizer",
    "FakeQuantizeCalibrator",
    "LayerSelector",
    "PrecisionTest",
    "QuantConfig",
    "__version__",
    "analyze",
    "dequantize",
    "evaluate_task",
    "evaluate_text",
    "load_model",
    "quantize",
    "tune",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'slim_ptq' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return __all__
