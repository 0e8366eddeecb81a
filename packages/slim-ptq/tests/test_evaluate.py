"""Perplexity against sums written out, and refusals."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from slim_core.errors import (
    FileSecurityError,
    InvalidTypeError,
    InvalidValueError,
    NumericalError,
)
from slim_ptq.evaluate import Perplexity, encode_text, perplexity, read_text

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "tiny-llama"
SHARED_TEXT = ROOT.parent / "shared" / "data" / "public_domain_test.txt"


def uniform(vocabulary):
    return lambda ids: torch.zeros(*ids.shape, vocabulary)


def by_hand(model, ids, window):
    """One token at a time from float64 probabilities."""
    total, count = 0.0, 0
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        if len(part) < 2:
            continue
        with torch.no_grad():
            logits = model(part[None]).logits[0].double()
        for position in range(len(part) - 1):
            probabilities = torch.softmax(logits[position], dim=0)
            total -= math.log(probabilities[part[position + 1]].item())
            count += 1
    return math.exp(total / count), count


# --- values ---------------------------------------------------------------------------------------


@given(st.integers(2, 5000), st.integers(2, 40), st.integers(2, 16), st.integers(1, 5))
def test_uniform_logits_give_the_size_of_the_vocabulary(vocabulary, tokens, window, batch):
    ids = torch.arange(tokens) % vocabulary
    result = perplexity(uniform(vocabulary), ids, window=window, batch_size=batch)
    assert result.value == pytest.approx(vocabulary, rel=1e-5)
    rest = tokens % window
    assert result.windows == tokens // window + (rest > 1)
    assert result.tokens == tokens // window * (window - 1) + max(rest - 1, 0)


def test_certainty_gives_one():
    def next_is_one_more(ids):
        return 100.0 * nn.functional.one_hot((ids + 1) % 7, 7).float()

    result = perplexity(next_is_one_more, torch.arange(50) % 7, window=10)
    assert result == Perplexity(pytest.approx(1.0, abs=1e-6), 45, 5)


@pytest.mark.parametrize("family", ["llama", "bloom", "chatglm"])
@pytest.mark.parametrize(("window", "batch"), [(16, 1), (16, 3), (37, 2), (128, 4)])
def test_is_what_a_plain_loop_gives(tiny_model, tiny_ids, family, window, batch):
    model = tiny_model(family)
    ids = tiny_ids(100)[0]
    result = perplexity(model, ids, window=window, batch_size=batch)
    value, tokens = by_hand(model, ids, window)
    assert result.value == pytest.approx(value, rel=1e-5)
    assert result.tokens == tokens
    assert result.windows == math.ceil(100 / window)


def test_is_what_cross_entropy_gives_over_one_window(tiny_model, tiny_ids):
    model, ids = tiny_model("llama"), tiny_ids(64)
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert perplexity(model, ids, window=64).value == pytest.approx(loss.exp().item(), rel=1e-5)


def test_windows_do_not_see_one_another(tiny_model, tiny_ids):
    model = tiny_model("llama")
    one, two = tiny_ids(32, seed=1)[0], tiny_ids(32, seed=2)[0]
    parts = [perplexity(model, part, window=32).value for part in (one, two)]
    both = perplexity(model, torch.cat([one, two]), window=32).value
    assert both == pytest.approx(math.sqrt(parts[0] * parts[1]), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_scored_in_float32(tiny_model, tiny_ids, dtype):
    model, ids = tiny_model("llama").to(dtype), tiny_ids(64)[0]
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    loss = nn.functional.cross_entropy(logits[:-1].float(), ids[1:])
    assert logits.dtype == dtype
    assert perplexity(model, ids, window=64).value == pytest.approx(loss.exp().item(), rel=1e-6)


def test_token_ids_may_be_a_list_or_a_row(tiny_model, tiny_ids):
    model, ids = tiny_model("llama"), tiny_ids(40)
    wanted = perplexity(model, ids[0], window=8)
    assert perplexity(model, ids, window=8) == wanted
    assert perplexity(model, ids[0].tolist(), window=8) == wanted
    assert perplexity(model, ids[0].int(), window=8) == wanted


def test_improbable_text_has_infinite_perplexity():
    def surely_zero(ids):
        return torch.tensor([2e3, 0.0]).expand(*ids.shape, 2)

    assert perplexity(surely_zero, [1, 1, 1]).value == math.inf


# --- the model is left as it was ------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, ids):
        logits = 3.0 * nn.functional.one_hot((ids + 1) % 5, 5)
        return self.frozen(self.dropout(logits)) + self.weight


def test_modes_are_restored_and_no_gradient_is_kept():
    model = Noisy().train()
    model.frozen.eval()
    one, two = (perplexity(model, torch.arange(40) % 5, window=8) for _ in range(2))
    assert one == two
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)
    assert model.weight.grad is None


def test_modes_are_restored_after_an_error():
    model = Noisy().train()
    model.weight.data.fill_(math.nan)
    with pytest.raises(NumericalError):
        perplexity(model, torch.arange(40) % 5)
    assert model.dropout.training


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        ([], {}, InvalidValueError, "token_ids must hold at least 2 tokens, not 0"),
        ([3], {}, InvalidValueError, "token_ids must hold at least 2 tokens, not 1"),
        ([[1, 2], [3, 4]], {}, InvalidValueError, r"one axis, not shape \(2, 2\)"),
        ([1.0, 2.0], {}, InvalidTypeError, "token_ids must be integers, not torch.float32"),
        ([True, False], {}, InvalidTypeError, "token_ids must be integers, not torch.bool"),
        ("hello", {}, InvalidTypeError, "token_ids must be a sequence of int"),
        (None, {}, InvalidTypeError, "token_ids must be a sequence of int"),
        ([1, -2], {}, InvalidValueError, "token_ids must be at least 0, not -2"),
        ([1, 128], {}, InvalidValueError, r"token_ids must be below 128 .* not 128"),
        ([1, 2], {"window": 1}, InvalidValueError, "window must be at least 2, not 1"),
        ([1, 2], {"window": 8.0}, InvalidTypeError, "window must be int, not float"),
        ([1, 2], {"window": 129}, InvalidValueError, "window must be at most 128 .* not 129"),
        ([1, 2], {"batch_size": 0}, InvalidValueError, "batch_size must be at least 1, not 0"),
    ],
)
def test_bad_arguments(tiny_model, ids, options, error, message):
    with pytest.raises(error, match=message):
        perplexity(tiny_model("llama"), ids, **{"window": 64, **options})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("batch", [1, 3])
def test_window_with_broken_logits_is_named(bad, batch):
    def breaks_at_token_nine(ids):
        logits = torch.zeros(*ids.shape, 16)
        logits[ids == 9] = bad
        return logits

    ids = torch.arange(16).repeat_interleave(2)  # token 9 stands in the fifth window of four
    with pytest.raises(NumericalError, match=r"window 4 \(tokens 16 and on\) are not finite"):
        perplexity(breaks_at_token_nine, ids, window=4, batch_size=batch)


@pytest.mark.parametrize(
    ("output", "shape"),
    [
        (lambda ids: torch.zeros(len(ids), 5), r"\(1, 5\)"),
        (lambda ids: [1, 2], "list"),
        (lambda ids: torch.zeros(len(ids), ids.shape[1] + 1, 5), r"\(1, 4, 5\)"),
    ],
)
def test_what_is_no_logits(output, shape):
    with pytest.raises(InvalidValueError, match=rf"\(1, 3, 'vocabulary'\), not {shape}"):
        perplexity(output, [1, 2, 3])


# --- text -----------------------------------------------------------------------------------------


def test_read_text(tmp_path):
    file = tmp_path / "t.txt"
    file.write_bytes("\N{ZERO WIDTH NO-BREAK SPACE}na\u00efve\r\nline\n".encode())
    assert read_text(file) == "na\u00efve\nline\n"


@pytest.mark.parametrize("content", [b"", b" \r\n\t"])
def test_file_without_text(tmp_path, content):
    file = tmp_path / "t.txt"
    file.write_bytes(content)
    with pytest.raises(InvalidValueError, match=r"t\.txt holds no text"):
        read_text(file)


def test_file_that_is_not_text(tmp_path):
    file = tmp_path / "t.txt"
    file.write_bytes(b"abc\xff")
    with pytest.raises(InvalidValueError, match=r"t\.txt is not UTF-8 text: .* position 3"):
        read_text(file)


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_text(tmp_path / "t.txt")
    with pytest.raises(FileSecurityError, match="is not a regular file"):
        read_text(tmp_path)


@pytest.fixture(scope="module")
def example():
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(EXAMPLE)


def test_encode_text_has_no_special_tokens_and_is_quiet(example, capsys):
    _, tokenizer = example
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = encode_text(tokenizer, "we the people " * 700)
    assert ids.dtype == torch.int64
    assert ids.ndim == 1
    assert tokenizer.decode(ids) == "we the people " * 700
    assert tokenizer.eos_token_id not in ids.tolist()
    assert capsys.readouterr() == ("", "")
    with pytest.raises(InvalidTypeError, match="text must be str, not bytes"):
        encode_text(tokenizer, b"x")


def test_example_model_on_its_own_text(example):
    model, tokenizer = example
    ids = encode_text(tokenizer, read_text(ROOT / "examples" / "eval.txt"))[:4096]
    result = perplexity(model, ids)
    wanted, tokens = by_hand(model, ids, 512)
    assert result == Perplexity(pytest.approx(wanted, rel=1e-5), tokens, 8)
    # Far better than chance, and as good as a model is on what it wrote at temperature 0.9.
    assert 10 < result.value < 40
    shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    assert perplexity(model, shuffled).value > 10 * result.value


@pytest.mark.oracle
@pytest.mark.skipif(not SHARED_TEXT.exists(), reason=f"{SHARED_TEXT} is not there")
def test_example_model_on_real_text(example):
    model, tokenizer = example
    ids = encode_text(tokenizer, read_text(SHARED_TEXT))[: 40 * 512]
    result = perplexity(model, ids)
    # Documented as about 42.
    assert 40 < result.value < 44
    assert result.tokens == 40 * 511
