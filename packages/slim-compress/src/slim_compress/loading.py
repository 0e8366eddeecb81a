"""Reading a dictionary of weights from a ``.npy`` file that nobody vouches for."""

from __future__ import annotations

from typing import Any

from slim_compress.errors import UntrustedDataError
from slim_core.errors import FileSecurityError
from slim_core.files import PathLike, as_path, check_input_file
from slim_core.logging import get_logger
from slim_core.pickles import load_npy_dict

MAX_BYTES = 512 << 30
_logger = get_logger("compress")


def load_weights(path: PathLike, *, trusted: bool = False) -> dict[str, Any]:
    """Load name -> array from a dictionary saved with ``np.save``.

    Asks on the terminal whether the source is trusted.  Either way no code of the file is run:
    the pickle in it is read by a reader that knows dictionaries, text, numbers and arrays only.

    Parameters
    ----------
    path : path
        Ends in ``.npy``.
    trusted : bool
        Do not ask.

    Raises
    ------
    UntrustedDataError
        The answer was not exactly ``yes``.
    FileNotFoundError, FileSecurityError, CheckpointError
        There is no such file, it is unsafe, or it holds something else; see
        :func:`slim_core.pickles.load_npy_dict`.
    """
    file = as_path("weight_path", path)
    if file.suffix != ".npy":
        raise FileSecurityError(f"weight_path must end in .npy, not {file.name!r}")
    if not trusted:
        _confirm(str(file))
    return load_npy_dict(check_input_file(file, max_bytes=MAX_BYTES), max_bytes=MAX_BYTES)


def _confirm(path: str) -> None:
    _logger.warning("%s holds pickled data. Load it only if you trust where it comes from.", path)
    try:
        answer = input(f"Is {path} from a trusted source? Please enter 'yes' or 'no'\n")
    except EOFError:
        answer = ""
    if answer != "yes":
        raise UntrustedDataError(
            "Loading is prohibited because the data may be from untrusted sources.",
            hint="answer yes, or pass trusted=True in a batch job",
        )
