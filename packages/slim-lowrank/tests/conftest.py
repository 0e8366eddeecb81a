import sys
from pathlib import Path

import pytest
import torch

# The worker script of the two-process test imports the same models, so they are a plain module.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
