"""The quality of a model directory: its perplexity on a text."""

from __future__ import annotations

from slim_core.checkpoint import open_checkpoint
from slim_core.files import PathLike, as_path
from slim_core.validate import check_int
from slim_ptq.calibration.text import load_tokenizer
from slim_ptq.evaluate import Perplexity, encode_text, perplexity, read_text
from slim_ptq.limits import within_positions
from slim_ptq.load import load_model


def evaluate_text(
    model: PathLike,
    text: PathLike,
    *,
    window: int = 512,
    batch_size: int = 4,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Perplexity:
    """Return the perplexity of a float or quantized model directory on a text file.

    Raises
    ------
    SlimError
        The model, its tokenizer or the text cannot be used.
    """
    directory = as_path("model", model)
    check_int("window", window, low=2)
    # What is wrong with the files is said before torch loads them.
    config = open_checkpoint(directory).config
    content = read_text(text)
    tokens = encode_text(load_tokenizer(directory), content)
    loaded = load_model(directory, device=device, trust_remote_code=trust_remote_code)
    return perplexity(
        loaded,
        tokens,
        window=within_positions(window, config),
        batch_size=batch_size,
    )
