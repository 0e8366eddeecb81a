"""Tests of calibration data and of what the blocks of a model are called with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slim_core.errors import CalibrationError, NumericalError
from slim_core.layers import QuantizedLinear
from slim_core.scheme import QuantScheme
from slim_ptq.calibration.capture import capture_calls, first_call, output_form
from slim_ptq.calibration.observed import ObservedLinear
from slim_ptq.calibration.text import (
    TokenWindows,
    read_calibration,
    texts_to_calibration,
    windows,
)
from slim_ptq.methods import quantize_minmax
from slim_ptq.observers import MeanMinMaxObserver
from slim_ptq.structure import find_blocks

Factory = Callable[..., Any]
EXAMPLES = Path(__file__).parents[3] / "examples"
MODEL = EXAMPLES / "tiny-llama"


class TestWindows:
    @given(st.integers(1, 500), st.integers(1, 20), st.integers(1, 60), st.integers(1, 8))
    def test_equal_windows_of_the_first_tokens(
        self, count: int, samples: int, length: int, batch: int
    ) -> None:
        batches = windows(range(count), samples, length, batch)
        width = min(length, count)
        flat = torch.cat([part.flatten() for part in batches]).tolist()
        assert flat == list(range(min(samples, count // width) * width))
        assert all(part.shape[1] == width and part.dtype == torch.long for part in batches)
        assert all(part.shape[0] == batch for part in batches[:-1])
        assert 1 <= batches[-1].shape[0] <= batch

    def test_none(self) -> None:
        with pytest.raises(CalibrationError, match="no tokens"):
            windows([], 1, 1, 1)

    def test_head(self) -> None:
        data = TokenWindows(windows(range(100), 10, 10, 4), "x")
        assert (data.rows, data.tokens) == (10, 100)
        first = data.head(5)
        assert [batch.shape[0] for batch in first.batches] == [4, 1]
        assert first.batches[1].tolist() == [list(range(40, 50))]
        assert data.head(50).rows == 10
        assert data.to_dict() == {"source": "x", "samples": 10, "tokens": 100}


class TestFiles:
    def write(self, path: Path, *lines: Any) -> Path:
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        path.write_text(text, encoding="utf-8")
        return path

    def test_token_numbers_are_joined(self, tmp_path: Path) -> None:
        file = self.write(tmp_path / "c.jsonl", {"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]})
        data = read_calibration(file, tmp_path, samples=8, length=2)
        assert [batch.tolist() for batch in data.batches] == [[[1, 2], [3, 4]]]
        assert data.source == "c.jsonl"

    def test_texts_end_with_the_end_token(self, tmp_path: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        expected: list[int] = []
        for text in ("One day", "a line\u2028another"):
            expected += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        # The separator stands in the file as it is, and ends no line of it.
        file = self.write(
            tmp_path / "c.jsonl", {"text": "One day"}, {"text": "a line\u2028another"}
        )
        assert "\u2028" in file.read_text(encoding="utf-8")
        data = read_calibration(file, MODEL, samples=1, length=100)
        assert data.batches[0].tolist() == [expected]
        in_memory = texts_to_calibration(
            ["One day", "a line\u2028another"], MODEL, samples=1, length=100, batch=1
        )
        assert torch.equal(in_memory.batches[0], data.batches[0])

    def test_plain_text(self, tmp_path: Path) -> None:
        file = tmp_path / "story.txt"
        file.write_text("Once upon a time. " * 50)
        data = read_calibration(file, MODEL, samples=4, length=16, batch=3)
        assert [tuple(batch.shape) for batch in data.batches] == [(3, 16), (1, 16)]

    def test_no_more_is_tokenized_than_needed(self, tmp_path: Path) -> None:
        file = self.write(
            tmp_path / "c.jsonl", {"input_ids": [1] * 8}, {"text": "would need a tokenizer"}
        )
        assert read_calibration(file, tmp_path, samples=2, length=4).tokens == 8

    def test_messages_go_through_the_chat_template(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers import AutoTokenizer

        from slim_ptq.calibration import text

        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        monkeypatch.setattr(text, "load_tokenizer", lambda _path: tokenizer)
        messages = [{"role": "user", "content": "Hello"}]
        file = self.write(tmp_path / "c.jsonl", {"messages": messages})
        with pytest.raises(CalibrationError, match="line 1: has messages, the tokenizer no chat"):
            read_calibration(file, MODEL)
        tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        data = read_calibration(file, MODEL, samples=1, length=100)
        assert tokenizer.decode(data.batches[0][0]).startswith("<user>Hello")
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(CalibrationError, match=r"line 1: the chat template fails.*alternate"):
            read_calibration(file, MODEL)


class TestCapture:
    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom", "chatglm"])
    def test_the_blocks_get_what_the_model_gives_them(
        self, tiny_model: Factory, tiny_ids: Factory, capture_block: Factory, family: str
    ) -> None:
        model, ids = tiny_model(family), tiny_ids(12, batch=2)
        blocks = find_blocks(model)
        args, kwargs = first_call(model, blocks[0], ids[:1])
        with torch.no_grad():
            form = output_form(model.get_submodule(blocks[0])(*args, **kwargs))
            hidden, calls = capture_calls(model, blocks, ids, form)
            final: list[torch.Tensor] = []
            handle = model.get_submodule(blocks[-1]).register_forward_hook(
                lambda _m, _i, out: final.append(out if torch.is_tensor(out) else out[0])
            )
            model(ids)
            handle.remove()
            for index, name in enumerate(blocks):
                hidden = calls.run(model.get_submodule(name), index, hidden)
        torch.testing.assert_close(hidden, final[0])


class TestObserved:
    def observed(self, keep: float, generator: torch.Generator | None = None) -> ObservedLinear:
        scheme = QuantScheme.parse("w8a8")
        assert scheme.weight is not None
        assert scheme.activation is not None
        weight = torch.eye(4)
        layer = QuantizedLinear("a", scheme, *quantize_minmax("a", weight, scheme.weight))
        return ObservedLinear(
            layer,
            scheme.activation,
            MeanMinMaxObserver(),
            dtype=torch.float32,
            keep=keep,
            generator=generator,
        )

    def test_all_none_or_some_elements_are_passed_on_quantized(self) -> None:
        x = torch.randn(1, 500, 4, generator=torch.Generator().manual_seed(0))
        scale = (x.max() - x.min()) / 255
        noise = {
            keep: (self.observed(keep, torch.Generator().manual_seed(1))(x) - x).abs() > 1e-6
            for keep in (0.0, 0.3, 1.0)
        }
        shares = {keep: float(moved.float().mean()) for keep, moved in noise.items()}
        assert shares[0.0] == 0.0
        assert shares[1.0] > 0.99
        assert shares[0.3] == pytest.approx(0.3, abs=0.04)
        assert float((self.observed(1.0)(x) - x).abs().max()) < float(scale)

    def test_no_token_is_no_sample(self) -> None:
        layer = self.observed(1.0)
        assert layer(torch.ones(0, 4)).shape == (0, 4)
        with pytest.raises(CalibrationError):
            layer.finish()

    def test_a_damaged_activation(self) -> None:
        with pytest.raises(NumericalError, match="the input of a has 1 NaN or infinite"):
            self.observed(1.0)(torch.tensor([[1.0, float("inf"), 0.0, 0.0]]))
