"""Left padding, read off the masks that models make."""

from __future__ import annotations

import torch
from torch import Tensor

from slim_core.errors import StructureError


def mask_padding(mask: Tensor | None, columns: int) -> Tensor | None:
    """Count the padding of each row by a four-dimensional mask.

    Parameters
    ----------
    mask : Tensor or None
        ``[B, 1 or H, T, columns or more]``: bool, True where seen, or added to the logits.
    columns : int
        Key columns there are; masks for preallocated caches are longer.

    Returns
    -------
    Tensor or None
        int64 ``[B]``, as :func:`left_padding` counts it.
    """
    if mask is None:
        return None
    last = mask[:, 0, -1, :columns]  # the last query sees every real token
    hidden = ~last if last.dtype == torch.bool else last < torch.finfo(last.dtype).min / 2
    return left_padding(~hidden)


def left_padding(real: Tensor) -> Tensor | None:
    """Count the padding at the left of each row of a mask.

    Parameters
    ----------
    real : Tensor
        Bool ``[B, T]``, True at real tokens.

    Returns
    -------
    Tensor or None
        int64 ``[B]``; None when every token is real.

    Raises
    ------
    StructureError
        A row is empty, or has padding after its first real token.
    """
    if bool(real.all()):
        return None
    pads = real.shape[1] - real.sum(1)
    columns = torch.arange(real.shape[1], device=real.device)
    if not torch.equal(real, columns >= pads[:, None]) or bool((pads == real.shape[1]).any()):
        raise StructureError(
            "the attention mask has padding that is not at the left of its row",
            hint="set tokenizer.padding_side = 'left'; every row needs a real token",
        )
    return pads
