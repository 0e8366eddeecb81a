"""What an algorithm may need to know of a network that it cannot call with token ids alone."""

from __future__ import annotations

from typing import Any

import numpy as np


class NetworkHelper:
    """Base class: a network with inputs of its own gets a subclass that runs it.

    Only :meth:`generate` is needed for calibration, and only for networks that cannot be called
    with int32 token ids.
    """

    def create_network(self) -> Any:
        """Return a new network."""
        raise NotImplementedError

    def create_tokenizer(self, **kwargs: Any) -> Any:
        """Return the tokenizer of the network."""
        raise NotImplementedError

    def get_spec(self, name: str) -> Any:
        """Return a property of the network, such as ``batch_size`` or ``seq_length``."""
        raise NotImplementedError

    def generate(
        self,
        network: Any,
        input_ids: np.ndarray,
        max_new_tokens: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the network on token ids (batch, length) and return what it continues them with."""
        raise NotImplementedError

    def assemble_inputs(self, input_ids: np.ndarray, **kwargs: Any) -> Any:
        """Return the inputs of the network for token ids."""
        raise NotImplementedError
