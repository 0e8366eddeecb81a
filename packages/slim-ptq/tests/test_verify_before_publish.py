"""An output that does not pass its own verification never appears."""

from __future__ import annotations

from pathlib import Path

import pytest

from slim_core.errors import FormatError
from slim_core.verify import Verification
from slim_ptq import quantize, readback

MODEL = Path(__file__).parents[3] / "examples" / "tiny-llama"


def test_unsound_output_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        readback, "verify_checkpoint", lambda _path: Verification(1, 2, ("it is odd",))
    )
    with pytest.raises(FormatError, match="it is odd"):
        quantize(MODEL, tmp_path / "out", scheme="w8a16")
    assert list(tmp_path.iterdir()) == []
