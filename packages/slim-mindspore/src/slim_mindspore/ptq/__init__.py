"""The Python interface of MindSpore Golden Stick: a configuration, ``apply`` and ``convert``.

::

    from slim_mindspore.ptq import PTQ, OutliersSuppressionType, PTQConfig

    config = PTQConfig(
        weight_quant_dtype=msdtype.int8,
        act_quant_dtype=msdtype.int8,
        outliers_suppression=OutliersSuppressionType.SMOOTH,
        opname_blacklist=["lm_head", "w2"],
    )
    algorithm = PTQ(config)
    network = algorithm.convert(algorithm.apply(network, datasets=datasets))
    ms.save_checkpoint(network, "ptq.ckpt")
"""

from slim_mindspore.ptq.algorithms import PTQ, RoundToNearest, SmoothQuant
from slim_mindspore.ptq.config import (
    AWQConfig,
    BackendTarget,
    GPTQQuantConfig,
    OutliersSuppressionType,
    PrecisionRecovery,
    PTQConfig,
    PTQMode,
    QuantGranularity,
    SmoothQuantConfig,
)
from slim_mindspore.ptq.network_helper import NetworkHelper

__all__ = [
    "PTQ",
    "AWQConfig",
    "BackendTarget",
    "GPTQQuantConfig",
    "NetworkHelper",
    "OutliersSuppressionType",
    "PTQConfig",
    "PTQMode",
    "PrecisionRecovery",
    "QuantGranularity",
    "RoundToNearest",
    "SmoothQuant",
    "SmoothQuantConfig",
]
