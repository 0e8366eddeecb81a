import json

import numpy as np
import pytest

from slim_core.errors import CalibrationError, InvalidValueError
from slim_mindspore.datasets import DATASETS, read_texts, token_batches

FILES = {
    "boolq": (
        '{"passage": "P", "question": "is it"}\n\n{"inputs_pretokenized": "whole"}\n',
        ["P\nQuestion: is it?\nAnswer:", "whole"],
    ),
    "wikitext2": ("one\ntwo", ["one\ntwo"]),
    "squad1.1": (
        json.dumps({"data": [{"paragraphs": [{"context": "C", "qas": [{"question": "Q?"}]}]}]}),
        ["C\nQuestion: Q?\nAnswer:"],
    ),
    "ceval": (
        "id,question,A,B,C,D,answer\n0,Q?,a,b,c,d,A\n",
        ["Q?\nA. a\nB. b\nC. c\nD. d\nAnswer:"],
    ),
    "gsm8k": ('{"question": "Q?", "answer": "4"}', ["Question: Q?\nAnswer: 4"]),
    "calibrate": ('{"text": "a"}\n{"text": "b"}', ["a", "b"]),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_layouts(tmp_path, kind):
    text, expected = FILES[kind]
    path = tmp_path / "data"
    path.write_text(text)
    assert read_texts(path, kind) == expected


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("boolq", '{"passage": "P"}', "data:1 has no text 'question'"),
        ("boolq", "x", "data:1 is not JSON"),
        ("calibrate", '{"text": "a"}\n3', "data:2 must be a JSON object"),
        ("calibrate", " \n", "holds no sample"),
        ("squad1.1", "{}", "is not SQuAD JSON"),
        ("ceval", "question,A\nQ,a\n", "data:2 has no text 'B'"),
    ],
)
def test_damaged_files(tmp_path, kind, text, message):
    path = tmp_path / "data"
    path.write_text(text)
    with pytest.raises(CalibrationError, match=message):
        read_texts(path, kind)


def test_other_mistakes(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CalibrationError, match="is not UTF-8"):
        read_texts(path, "wikitext2")
    with pytest.raises(InvalidValueError, match="dataset type must be one of"):
        read_texts(path, "c4")
    with pytest.raises(FileNotFoundError):
        read_texts(tmp_path / "none", "boolq")


def test_batches(tokenizer):
    batches = token_batches(tokenizer, ["The people of this country. " * 40], 32, samples=3)
    assert [batch.shape for batch in batches] == [(1, 32)] * 3
    batches = token_batches(tokenizer, ["The people", "", "of this country"], 2, samples=3)
    assert [batch.shape for batch in batches] == [(1, 2), (1, 2)]
    assert batches[0].dtype == np.int32
    with pytest.raises(CalibrationError, match="give no token"):
        token_batches(tokenizer, ["", ""], 2)
