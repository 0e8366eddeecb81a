"""The one place that imports MindSpore; every module that needs it imports this one.

Importing :mod:`slim_mindspore` does not come here: MindSpore takes seconds to load, and reading
checkpoints, checking configurations or converting names works without it.
"""

from slim_core.errors import MissingDependencyError

try:
    import mindspore as ms
    from mindspore import Parameter, Tensor, nn, ops
except ModuleNotFoundError as error:
    if error.name != "mindspore":
        raise
    raise MissingDependencyError(
        "this function needs MindSpore, which is not installed; "
        "it comes with the extra slim-mindspore[mindspore]",
        hint="pip install 'slim-mindspore[mindspore]'",
    ) from error

__all__ = ["Parameter", "Tensor", "ms", "nn", "ops"]
