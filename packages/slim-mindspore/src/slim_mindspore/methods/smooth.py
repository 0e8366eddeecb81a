"""SmoothQuant: move the outliers of activations into weights (arXiv:2211.10438)."""

from __future__ import annotations

import numpy as np

MIN_SCALE = 1e-5


def smooth_scales(input_peak: np.ndarray, weight: np.ndarray, alpha: float) -> np.ndarray:
    """Return what to divide each input channel and multiply each weight column by.

    ``s = max|x|^alpha / max|w|^(1 - alpha)``, at least 1e-5, and 1 for channels where either
    maximum is 0.

    Parameters
    ----------
    input_peak : numpy.ndarray, float32, shape (in,)
        Largest magnitude of each input channel.
    weight : numpy.ndarray, float32, shape (out, in)
        Of all layers that read the input, stacked, if they are to share the scales.
    alpha : float
        In ``[0, 1]``.
    """
    peak = input_peak.astype(np.float64)
    columns = np.abs(weight).max(axis=0).astype(np.float64)
    used = (peak > 0) & (columns > 0)
    ratio = np.where(used, peak, 1.0) ** alpha / np.where(used, columns, 1.0) ** (1 - alpha)
    return np.where(used, np.maximum(ratio, MIN_SCALE), 1.0).astype(np.float32)
