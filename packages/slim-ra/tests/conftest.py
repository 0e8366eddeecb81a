from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
EXAMPLES = Path(__file__).parents[3] / "examples"


def load(name: str, **kwargs):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        EXAMPLES / name, dtype=torch.float32, **kwargs
    ).eval()


@pytest.fixture(scope="session", autouse=True)
def quiet():
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@pytest.fixture(scope="session")
def copy_llama(quiet):
    return load("copy-llama")


@pytest.fixture(scope="session")
def tiny_llama(quiet):
    return load("tiny-llama")


@pytest.fixture(scope="session")
def tiny_bloom(quiet):
    return load("tiny-bloom")


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import PreTrainedTokenizerFast

    # By its file: the class named in tokenizer_config.json depends on the transformers release.
    file = EXAMPLES / "tiny-llama" / "tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def wired():
    from slim_ra.wired import wired_llama

    return wired_llama()
