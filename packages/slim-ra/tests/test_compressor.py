from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from slim_ra import RACompressConfig, RACompressor, RARopeCompressConfig, RARopeCompressor


def with_config(**kwargs):
    model = nn.Module()
    model.config = SimpleNamespace(**kwargs)
    return model


def test_rope_compressor(tmp_path, tiny_llama, tokenizer):
    compressor = RARopeCompressor(tiny_llama, tokenizer, RARopeCompressConfig(0.25, 0.1))
    assert (compressor.num_attention_heads, compressor.num_key_value_heads) == (8, 4)
    assert (compressor.hidden_size, compressor.num_kv_per_group) == (128, 2)
    path = tmp_path / "win.pt"
    assert compressor.get_compress_heads(str(path)) is None
    content = torch.load(path, weights_only=True)
    assert set(content) == {"prefix_matching", "copying"}
    for key, count in (("prefix_matching", 4), ("copying", 2)):
        heads = [(layer, head) for layer, row in content[key].items() for head in row]
        assert len(heads) == count
        assert all(0 <= layer < 4 and 0 <= head < 4 for layer, head in heads)
    compressor.get_compress_heads(str(path))  # an existing result is replaced


def test_alibi_compressor(tmp_path, tiny_bloom):
    compressor = RACompressor(tiny_bloom, RACompressConfig(theta=0.00001, alpha=100))
    assert (compressor.hidden_size, compressor.head_dim) == (128, 16)
    path = tmp_path / "win.pt"
    assert compressor.get_alibi_windows(str(path)) is None
    windows = torch.load(path, weights_only=True)
    assert windows.shape == (8,)
    assert bool((windows >= torch.tensor([176, 353, 707, 1415, 2831, 5663, 11326, 22652])).all())


def test_argument_types(tiny_llama, tokenizer):
    with pytest.raises(TypeError, match="model"):
        RACompressor("model", RACompressConfig())
    with pytest.raises(TypeError, match="cfg"):
        RACompressor(tiny_llama, RARopeCompressConfig())
    with pytest.raises(TypeError, match="tokenizer"):
        RARopeCompressor(tiny_llama, None, RARopeCompressConfig())
    with pytest.raises(TypeError, match="cfg"):
        RARopeCompressor(tiny_llama, tokenizer, {})


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.Module(), "attribute `config`"),
        (with_config(num_attention_heads=2), "`hidden_size` property"),
        (with_config(hidden_size=8), "`num_attention_heads` property"),
        (with_config(hidden_size=8, num_attention_heads=0), "`num_attention_heads` property"),
        (with_config(hidden_size=2002, num_attention_heads=2, num_hidden_layers=1), "head_dim"),
    ],
)
def test_models_without_sizes(model, text):
    with pytest.raises(ValueError, match=text):
        RACompressor(model, RACompressConfig())


def test_bad_path_costs_no_search(tiny_llama, tokenizer, monkeypatch):
    compressor = RARopeCompressor(tiny_llama, tokenizer, RARopeCompressConfig())
    monkeypatch.setattr(compressor, "get_attention_score", lambda: pytest.fail("searched"))
    with pytest.raises(ValueError, match="save_path"):
        compressor.get_compress_heads("win.bin")


def test_import_is_light():
    code = "import sys, slim_ra; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
