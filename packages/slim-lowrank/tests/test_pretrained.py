import json
import math
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

from slim_core.errors import CalibrationError, CheckpointError, InvalidValueError, OutputExistsError
from slim_lowrank import (
    Decomposer,
    count_parameters,
    load_pretrained,
    merge,
    output_loss,
    save_pretrained,
)
from slim_lowrank.cli import main
from slim_lowrank.measure import perplexity
from slim_lowrank.text import read_texts, token_windows

ROOT = Path(__file__).parents[3]
LLAMA = ROOT / "examples" / "tiny-llama"
CALIB = ROOT / "examples" / "calib.jsonl"
EVAL = ROOT / "examples" / "eval.txt"

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=48),
    "qwen2-tied": Qwen2Config(
        **SMALL, num_key_value_heads=2, intermediate_size=48, tie_word_embeddings=True
    ),
    "bloom": BloomConfig(
        **{key: value for key, value in SMALL.items() if "num_" not in key}, n_layer=2, n_head=4
    ),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "mixtral": MixtralConfig(
        **SMALL,
        num_key_value_heads=2,
        intermediate_size=48,
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
}


@pytest.fixture(params=CONFIGS)
def saved(request, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    model.save_pretrained(tmp_path / "dense")
    return model, tmp_path


def batches(count=6, length=24):
    ids = torch.randint(1, 96, (count, 4, length))
    return [{"input_ids": each, "labels": each} for each in ids]


@pytest.mark.parametrize("storage", ["factors", "pivot"])
def test_every_architecture_round_trips(saved, storage):
    model, folder = saved
    data = batches()
    decomposer = Decomposer(model, divisor=4, storage=storage).calibrate(data, loss=output_loss)
    plan = decomposer.budget(0.6)
    small, report = plan.apply(sequential=True, measure_on=data[:1])
    assert report.method == "loss"
    assert report.params_after < report.params_before
    save_pretrained(small, plan.table, folder / "dense", folder / "small", report=report)
    again = load_pretrained(folder / "small")
    ids = data[0]["input_ids"]
    expected = small(ids).logits
    assert torch.equal(again(ids).logits, expected)
    assert count_parameters(again) == count_parameters(small)
    generated = again.generate(ids[:1], max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, ids.shape[1] + 3)
    save_pretrained(merge(again), {}, folder / "small", folder / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_sequential_by_blocks_equals_the_whole_model(saved, monkeypatch):
    from slim_lowrank import sequential

    model, _ = saved
    data = batches()
    plan = Decomposer(model, divisor=4).calibrate(data).ratio(0.5)
    by_blocks, _ = plan.apply(sequential=True)
    found = sequential.find_chain(model, list(plan.table), sequential.calls_of(data)[0])
    assert len(found.names) == 2
    monkeypatch.setattr(sequential, "find_chain", lambda *args: None)
    whole, _ = plan.apply(sequential=True)
    ids = data[0]["input_ids"]
    torch.testing.assert_close(by_blocks(ids).logits, whole(ids).logits, rtol=1e-3, atol=1e-4)


def test_conv1d_of_gpt2_merges_back():
    model = GPT2LMHeadModel(CONFIGS["gpt2"]).eval()
    small, _ = Decomposer(model, include=["*.c_attn", "*.c_fc"], divisor=4).ratio(0.5).apply()
    merged = merge(small)
    assert type(merged.transformer.h[0].attn.c_attn) is type(model.transformer.h[0].attn.c_attn)
    ids = torch.randint(0, 96, (2, 10))
    torch.testing.assert_close(merged(ids).logits, small(ids).logits, rtol=1e-4, atol=1e-5)


def test_tampered_checkpoints_are_named(saved):
    model, folder = saved
    plan = Decomposer(model, divisor=4).ratio(0.5)
    small, _ = plan.apply()
    save_pretrained(small, plan.table, folder / "dense", folder / "small")
    with pytest.raises(OutputExistsError):
        save_pretrained(small, plan.table, folder / "dense", folder / "small")
    path = folder / "small" / "config.json"
    config = json.loads(path.read_text())
    layers = config["quantization_config"]["layers"]
    name = next(name for name in layers if ".0." in name)  # inside a block, so not tied
    entry = layers[name]
    entry["ranks"] = [entry["ranks"][0] // 2]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has the shape .* the model wants"):
        load_pretrained(folder / "small")
    del layers[name]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lacks|has no place"):
        load_pretrained(folder / "small")


def test_bfloat16_keeps_its_bits(tmp_path):
    model = load_pretrained(LLAMA)
    plan = Decomposer(model, include=["model.layers.*"], divisor=8).ratio(0.7)
    small, _ = plan.apply()
    save_pretrained(small, plan.table, LLAMA, tmp_path / "small")
    again = load_pretrained(tmp_path / "small")
    state = again.state_dict()
    for key, value in small.state_dict().items():
        assert state[key].dtype == value.dtype == torch.bfloat16
        assert torch.equal(state[key], value)
    modes = {
        file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "small").iterdir()
    }
    assert modes["model.safetensors"] == 0o400
    assert modes["config.json"] == 0o600


def test_shards(tmp_path):
    model = load_pretrained(LLAMA)
    plan = Decomposer(model, include=["model.layers.*"], divisor=8).ratio(0.7)
    small, _ = plan.apply()
    save_pretrained(small, plan.table, LLAMA, tmp_path / "small", max_shard_bytes=500_000)
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 2
    ids = torch.randint(0, 2048, (1, 16))
    assert torch.equal(load_pretrained(tmp_path / "small")(ids).logits, small(ids).logits)


def test_each_step_helps_on_a_trained_model():
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    train = token_windows(tokenizer, CALIB, length=256, samples=None)
    test = token_windows(tokenizer, EVAL, length=256, samples=24)
    model = load_pretrained(LLAMA).float()
    choices = {"include": ["model.layers.*"], "divisor": 1}
    dense = perplexity(model, test)
    plain = Decomposer(model, **choices)
    output = Decomposer(model, **choices).calibrate(train)
    loss = Decomposer(model, **choices).calibrate(train, loss=output_loss)
    for share in (0.6, 0.4):
        steps = [
            plain.ratio(share).apply(),
            output.ratio(share).apply(),
            output.budget(share).apply(),
            loss.budget(share).apply(),
        ]
        found = [math.log(perplexity(small, test) / dense) for small, _ in steps]
        assert found == sorted(found, reverse=True)
        assert found[-1] <= 0.25 * found[0]
        params = [report.params_after for _, report in steps]
        assert max(params) - min(params) < 0.01 * params[0]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_command_line(tmp_path, capsys):
    out, dense = tmp_path / "small", tmp_path / "dense"
    data = ("--calib", CALIB, "--eval", EVAL, "--length", 128, "--samples", 32, "--eval-samples", 8)
    assert run("decompose", LLAMA, out, "--budget", 0.7, *data, "--sequential") == 0
    printed = capsys.readouterr().out
    assert "layers decomposed (loss, sequential)" in printed
    assert "perplexity: " in printed
    report = json.loads((out / "slim_lowrank_report.json").read_text())
    lines = [line for line in report["layers"] if line["form"]]
    for line in lines:
        assert line["measured_error"] == pytest.approx(line["predicted_error"], rel=0.25)
    assert run("perplexity", out, "--eval", EVAL, "--length", 128, "--eval-samples", 8) == 0
    value = float(capsys.readouterr().out)
    # The last digit of sums in float32 depends on how the threads share them.
    assert value == pytest.approx(float(printed.rsplit("-> ", 1)[1].split()[0]), abs=2e-3)
    assert run("show", out) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(lines)
    assert run("merge", out, dense) == 0
    assert run("perplexity", dense, "--eval", EVAL, "--length", 128, "--eval-samples", 8) == 0
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx(value, rel=2e-3)


def test_sweep_draws(tmp_path, capsys):
    data = ("--calib", CALIB, "--eval", EVAL, "--length", 128, "--samples", 16, "--eval-samples", 4)
    data += ("--shrinkage", "auto")
    assert run("sweep", LLAMA, tmp_path / "curve.svg", *data, "--kept", 0.8, 0.5) == 0
    result = json.loads((tmp_path / "curve.json").read_text())
    for points in result["curves"].values():
        assert [point["kept_of_layers"] for point in points] == [0.8, 0.5]
        assert result["dense_perplexity"] < points[0]["perplexity"] < points[1]["perplexity"]
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")


def test_dry_run_writes_nothing(tmp_path, capsys):
    assert run("decompose", LLAMA, tmp_path / "out", "--budget", 0.8, "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    assert "(plain)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("decompose", LLAMA, "OUT", "--budget", 1.5), "--budget"),
        (("decompose", "absent", "OUT", "--budget", 0.5), "absent"),
        (("decompose", LLAMA, "OUT", "--budget", 0.5, "--method", "loss"), "--calib"),
        (("decompose", LLAMA, "OUT", "--budget", 0.5, "--sequential"), "--calib"),
        (("decompose", LLAMA, "OUT", "--budget", 0.5, "--calib", "absent.txt"), "absent.txt"),
        (("decompose", LLAMA, "OUT", "--budget", 0.5, "--exclude", "nothing"), "nothing"),
        (("decompose", LLAMA, "OUT", "--budget", 0.001), "least possible cost"),
        (("decompose", LLAMA, "OUT", "--budget", 0.5, "--device", "tpu"), "tpu"),
        (("decompose", LLAMA, "OUT", "--budget", 0.5, "--shrinkage", "much"), "--shrinkage"),
        (("decompose", LLAMA, LLAMA, "--budget", 0.5), "not empty"),
        (("sweep", LLAMA, "OUT.pdf", "--eval", EVAL), ".svg or .png"),
        (("merge", LLAMA, "OUT"), "not a decomposed model"),
        (("show", LLAMA), "not a decomposed model"),
    ],
)
def test_user_errors(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from slim_lowrank.cli import main\n"
        "assert main(['show', 'x']) == 2\n"
        "main(['decompose', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "slim-lowrank[hf]" in done.stderr
    assert "--budget" in done.stdout


def test_texts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"inputs_pretokenized": "two"}\n')
    assert read_texts(path) == ["one", "two"]
    path.write_text('{"text": "one"}\n{"text": 3}\n')
    with pytest.raises(InvalidValueError, match="line 2"):
        read_texts(path)
    path.write_text("nonsense")
    with pytest.raises(InvalidValueError, match="line 1: not JSON"):
        read_texts(path)
    (tmp_path / "b.txt").write_text("  \n")
    with pytest.raises(CalibrationError, match="no text"):
        read_texts(tmp_path / "b.txt")
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    (tmp_path / "b.txt").write_text("few words")
    with pytest.raises(CalibrationError, match="too few for a window of 64"):
        token_windows(tokenizer, tmp_path / "b.txt", length=64, samples=None)
