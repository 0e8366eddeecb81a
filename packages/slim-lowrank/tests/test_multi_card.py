import stat
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "multi_card_worker.py"


@pytest.mark.parametrize("model", ["sample", "resnet50"])
def test_two_cards_share_the_weights_of_one(tmp_path, model):
    command = [sys.executable, str(WORKER), str(tmp_path)]
    cards = [
        subprocess.Popen([*command, str(rank), model], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [card.communicate(timeout=300)[1] for card in cards]
    assert [card.returncode for card in cards] == [0, 0], errors
    assert stat.S_IMODE((tmp_path / "state.pt").stat().st_mode) == 0o640
