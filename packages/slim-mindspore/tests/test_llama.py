from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from slim_core.errors import CheckpointError, InvalidTypeError, InvalidValueError, StructureError
from slim_mindspore.ckpt import write_ckpt
from slim_mindspore.evaluate import perplexity
from slim_mindspore.hub import load_llama, read_config
from slim_mindspore.kv_cache import ChannelKV, TokenKV
from slim_mindspore.llama_config import LlamaConfig
from slim_mindspore.tensors import load_into, parameters_of

REFERENCE = Path(__file__).parent / "data" / "tiny_llama_logits.npz"


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE) as stored:
        return {name: stored[name] for name in stored.files}


def test_logits_are_those_of_transformers(shared_model, reference):
    logits = shared_model(ms.Tensor(reference["ids"])).asnumpy()[:, reference["positions"]]
    assert np.abs(logits - reference["logits"]).max() <= 1e-4
    np.testing.assert_array_equal(logits.argmax(-1), reference["logits"].argmax(-1))


def test_graph_mode_equals_pynative(shared_model, reference, graph_mode):
    graph = shared_model(ms.Tensor(reference["ids"])).asnumpy()
    ms.set_context(mode=ms.PYNATIVE_MODE)
    assert np.abs(graph - shared_model(ms.Tensor(reference["ids"])).asnumpy()).max() <= 1e-6


def test_one_graph_for_every_length(tiny, reference, graph_mode):
    tiny.set_inputs(ms.Tensor(shape=[1, None], dtype=ms.int32))
    short, long = (ms.Tensor(reference["ids"][:1, :n].astype(np.int32)) for n in (16, 40))
    graphs = [tiny(ids).asnumpy() for ids in (short, long)]
    ms.set_context(mode=ms.PYNATIVE_MODE)
    for graph, ids in zip(graphs, (short, long), strict=True):
        assert np.abs(graph - tiny(ids).asnumpy()).max() <= 1e-6


def test_cached_decoding_equals_recomputation(shared_model, reference):
    ids = reference["ids"][:, :32]
    cache = shared_model.new_cache()
    steps = [shared_model.decode(ms.Tensor(ids[:, :5]), cache).asnumpy()]
    for at in range(5, 32):
        steps.append(shared_model.decode(ms.Tensor(ids[:, at : at + 1]), cache).asnumpy())
    whole = shared_model(ms.Tensor(ids)).asnumpy()
    assert np.abs(np.concatenate(steps, axis=1) - whole).max() <= 1e-4
    assert cache.length == 32


@pytest.mark.parametrize("kind", ["float", "channel", "token"])
def test_float64(tiny_dir, shared_model, reference, kind):
    network = load_llama(tiny_dir, replace(read_config(tiny_dir), dtype="float64"))
    assert {str(parameter.dtype) for parameter in network.get_parameters()} == {"Float64"}
    ids = reference["ids"][:, :24]
    if kind == "float":
        single = shared_model(ms.Tensor(ids)).asnumpy()
        assert 1e-9 < np.abs(network(ms.Tensor(ids)).asnumpy() - single).max() <= 1e-4
    else:
        _quantize_cache(network, kind)
    cache = network.new_cache()
    steps = [network.decode(ms.Tensor(ids[:, at : at + 8]), cache).asnumpy() for at in (0, 8, 16)]
    whole = network(ms.Tensor(ids)).asnumpy()
    assert whole.dtype == np.float64
    assert np.abs(np.concatenate(steps, axis=1) - whole).max() <= 1e-12


def test_float64_in_graph_mode(tiny_dir, reference, graph_mode):
    network = load_llama(tiny_dir, replace(read_config(tiny_dir), dtype="float64"))
    graph = network(ms.Tensor(reference["ids"])).asnumpy()
    ms.set_context(mode=ms.PYNATIVE_MODE)
    assert np.abs(graph - network(ms.Tensor(reference["ids"])).asnumpy()).max() <= 1e-12


def _quantize_cache(network, kind):
    for layer in network.model.layers:
        for side in ("key_quant", "value_quant"):
            quant = ChannelKV(np.full(64, 0.05, np.float32), 4) if kind == "channel" else TokenKV()
            setattr(layer.attention, side, quant)


@pytest.mark.parametrize("kind", ["channel", "token"])
def test_an_int8_cache_stores_integers(tiny, reference, kind):
    ids = reference["ids"][:, :24]
    _quantize_cache(tiny, kind)
    cache = tiny.new_cache()
    first = tiny.decode(ms.Tensor(ids[:, :20]), cache).asnumpy()
    rest = tiny.decode(ms.Tensor(ids[:, 20:]), cache).asnumpy()
    whole = tiny(ms.Tensor(ids)).asnumpy()
    assert np.abs(np.concatenate([first, rest], axis=1) - whole).max() <= 1e-4
    codes = 4 * 2 * 2 * 24 * 64  # layers, sides, sequences, tokens, channels
    scales = 4 * 2 * 2 * 24 * 4 if kind == "token" else 0
    assert cache.nbytes == codes + scales


def test_generation(shared_model, reference):
    prompt = reference["ids"][:, :8]
    out = shared_model.generate(prompt, max_new_tokens=6)
    expected = prompt.astype(np.int64)
    for _ in range(6):
        logits = shared_model(ms.Tensor(expected.astype(np.int32))).asnumpy()
        expected = np.concatenate([expected, logits[:, -1].argmax(-1)[:, None]], axis=1)
    np.testing.assert_array_equal(out, expected)
    one = shared_model.generate(prompt[0], max_length=10)
    np.testing.assert_array_equal(one[0], expected[0, :10])
    greedy = shared_model.generate(prompt, max_new_tokens=3, do_sample=True, top_k=1)
    np.testing.assert_array_equal(greedy, expected[:, :11])
    options = {"max_new_tokens": 8, "do_sample": True, "top_p": 0.9, "temperature": 2.0}
    drawn = [shared_model.generate(prompt, **options, seed=seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()


def test_generation_ends_at_eos(tiny, reference):
    prompt = reference["ids"][:, :8]
    free = tiny.generate(prompt, max_new_tokens=5)
    tiny.config = replace(tiny.config, eos_token_id=int(free[0, 9]))
    out = tiny.generate(prompt, max_new_tokens=5)
    stop = 8 + int(np.argmax(out[0, 8:] == free[0, 9]))
    assert (out[0, stop:] == free[0, 9]).all()


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        ([[1.5]], {}, InvalidTypeError, "input_ids must be integers"),
        ([[1], [1, 2]], {}, InvalidValueError, "sequences of one length"),
        ([[]], {}, InvalidTypeError, "input_ids must be integers"),
        ([[2048]], {}, InvalidValueError, r"input_ids must lie in \[0, 2047\]"),
        ([[1]], {"max_new_tokens": 0}, InvalidValueError, "max_new_tokens must be at least 1"),
        ([[1, 2]], {"max_length": 2}, InvalidValueError, "max_length must be at least 3"),
        ([[1]], {"max_new_tokens": 1025}, InvalidValueError, "1025 tokens are more than the 1024"),
        ([[1]], {"temperature": 0.0}, InvalidValueError, "temperature must be above 0"),
        ([[1]], {"top_p": 1.5}, InvalidValueError, "top_p"),
        ([[1]], {"do_sample": 1}, InvalidTypeError, "do_sample must be bool"),
    ],
)
def test_bad_generation_arguments(shared_model, ids, options, error, message):
    with pytest.raises(error, match=message):
        shared_model.generate(ids, **options)


def test_perplexity(shared_model):
    ids = np.arange(1, 41)
    logits = shared_model(ms.Tensor(ids.reshape(2, 20).astype(np.int32))).asnumpy()
    logits = logits.astype(np.float64)
    chosen = [
        logits[r, t, ids[20 * r + t + 1]] - np.log(np.exp(logits[r, t]).sum())
        for r in range(2)
        for t in range(19)
    ]
    assert perplexity(shared_model, ids, window=20) == pytest.approx(np.exp(-np.mean(chosen)))
    with pytest.raises(InvalidValueError, match="40 tokens do not fill a window of 64"):
        perplexity(shared_model, ids, window=64)


def test_loading_is_strict(tiny, tmp_path):
    tensors = parameters_of(tiny)
    del tensors["model.norm_out.weight"]
    tensors["model.extra"] = np.zeros(1, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    before = tiny.model.layers[0].attention.wq.weight.asnumpy().copy()
    tensors["model.layers.0.attention.wq.weight"] = before + 1
    with pytest.raises(CheckpointError) as info:
        load_into(tiny, tensors)
    for problem in (
        "model.norm_out.weight is missing",
        "model.extra is not expected",
        "lm_head.weight has shape (2047, 128), the network (2048, 128)",
    ):
        assert problem in str(info.value)
    np.testing.assert_array_equal(tiny.model.layers[0].attention.wq.weight.asnumpy(), before)
    tensors = parameters_of(tiny)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is int8"):
        load_into(tiny, tensors)


def test_tied_embeddings(tiny_dir, shared_model, tmp_path):
    tensors = parameters_of(shared_model)
    del tensors["lm_head.weight"]
    write_ckpt(tmp_path / "tied.ckpt", tensors)
    config = replace(read_config(tiny_dir), tie_word_embeddings=True)
    network = load_llama(tmp_path / "tied.ckpt", config)
    ids = ms.Tensor(np.arange(1, 9, dtype=np.int32)[None])
    hidden = network.model(ids).asnumpy()
    table = tensors["model.tok_embeddings.embedding_weight"]
    np.testing.assert_allclose(network(ids).asnumpy(), hidden @ table.T, atol=1e-4)


def test_configurations():
    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_layers": 1,
        "num_heads": 4,
    }
    config = LlamaConfig.from_mindformers(sizes | {"n_kv_heads": 2, "seq_length": 16})
    assert (config.head_dim, config.n_kv_heads, config.max_positions) == (2, 2, 16)
    with pytest.raises(StructureError, match="has no intermediate_size"):
        LlamaConfig.from_mindformers(sizes | {"intermediate_size": None})
    with pytest.raises(InvalidValueError, match="n_kv_heads=3 does not divide num_heads=4"):
        LlamaConfig.from_mindformers(sizes | {"n_kv_heads": 3})
    with pytest.raises(InvalidValueError, match="dtype must be one of 'float32', 'float64'"):
        replace(config, dtype="bfloat16")
    with pytest.raises(StructureError, match="model_type must be llama, not 'bloom'"):
        LlamaConfig.from_hugging_face({"model_type": "bloom"})
    with pytest.raises(StructureError, match=r"config\.json has no vocab_size"):
        LlamaConfig.from_hugging_face({"model_type": "llama"})
    with pytest.raises(StructureError, match="rotary frequencies"):
        LlamaConfig.from_hugging_face({"model_type": "llama", "rope_scaling": {"type": "yarn"}})
