import json

import numpy as np
import pytest

from slim_core.verify import verify_checkpoint
from slim_mindspore.ckpt import CkptFile, read_ckpt
from slim_mindspore.cli import main
from slim_mindspore.tensors import load_tensors

YAML = """
load_checkpoint: {source}
output_dir: {out}/output
trainer: {{type: CausalLanguageModelingTrainer}}
processor: {{tokenizer: {{tokenizer_file: {tokenizer}}}}}
model:
  arch: {{type: LlamaForCausalLM}}
  model_config:
    seq_length: 64
    hidden_size: 128
    num_layers: 4
    num_heads: 8
    n_kv_heads: 4
    intermediate_size: 352
    vocab_size: 2048
    rms_norm_eps: 1.0e-5
    compute_dtype: float32
"""


@pytest.fixture
def config(tmp_path, float_ckpt, tiny_dir):
    path = tmp_path / "predict.yaml"
    text = YAML.format(source=float_ckpt, out=tmp_path, tokenizer=tiny_dir / "tokenizer.json")
    path.write_text(text)
    return path


@pytest.fixture
def boolq(tmp_path):
    path = tmp_path / "dev.jsonl"
    rows = [
        {"passage": f"The river is {n} miles long.", "question": "is it long", "answer": True}
        for n in range(20)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def fails(capsys, arguments, message):
    assert main([str(item) for item in arguments]) == 1
    assert message in capsys.readouterr().err


def test_the_seed_command(config, boolq, tmp_path, capsys):
    arguments = ["quantize", "-c", config, "-s", boolq, "-t", "boolq", "-q", "rtn-a16w8"]
    assert main([str(item) for item in arguments]) == 0
    file = tmp_path / "output" / "rtn-a16w8_ckpt" / "rank_0" / "rtn-a16w8.ckpt"
    assert f"Written: {file}" in capsys.readouterr().out
    assert file.stat().st_mode & 0o777 == 0o400
    info = CkptFile(file).tensors
    cell = "model.layers.3.feed_forward.w2"
    assert info[f"{cell}._handler.weight"].dtype == np.int8
    assert info[f"{cell}._weight_quantizer.scale"].shape == (128,)
    report = json.loads((file.parent / "slim_report.json").read_text())
    assert report["calibration"]["samples"] == 20
    fails(capsys, arguments, "is there already")
    assert main([*(str(item) for item in arguments), "--overwrite"]) == 0


def test_a_configuration_in_the_file(config, tmp_path, capsys):
    text = config.read_text()
    fails(capsys, ["quantize", "-c", config], "has no quantization_config")
    config.write_text(
        text
        + "    quantization_config:\n      quant_method: 'ptq'\n      weight_dtype: 'int4'\n"
        + "      modules_to_not_convert: ['lm_head']\n"
    )
    assert main(["quantize", "-c", str(config)]) == 0
    file = CkptFile(tmp_path / "output" / "ptq_ckpt" / "rank_0" / "ptq.ckpt")
    assert len(file.int4) == 28
    config.write_text(text + "    quantization_config: {quant_method: 'ptq', bits: 4}\n")
    fails(capsys, ["quantize", "-c", config], "bits: unknown key")


def test_the_plain_form(tiny_dir, boolq, tmp_path, capsys):
    out = tmp_path / "out"
    command = f"quantize {tiny_dir} {out} -q ptq -w int8 -a int8 -s {boolq} -t boolq"
    dump = ["-d", str(tmp_path / "dump")]
    assert main([*command.split(), "--seq-length", "32", "--samples", "3", *dump]) == 0
    assert verify_checkpoint(out).sound
    assert len(list((tmp_path / "dump").iterdir())) == 28
    with np.load(tmp_path / "dump" / "model.layers.1.attention.wq.npz") as arrays:
        assert arrays["weight_scale"].shape == (128, 1)
        span = max(arrays["input_high"].max(), 0) - min(arrays["input_low"].min(), 0)
        assert arrays["input_scale"][0] == pytest.approx(span / 255, rel=2**-8)
        assert (
            arrays["input_mean"] <= np.maximum(-arrays["input_low"], arrays["input_high"])
        ).all()
    assert "W8A8" in capsys.readouterr().out
    text = tmp_path / "eval.txt"
    text.write_text("The people of this country. " * 300)
    command = f"quantize {tiny_dir} {tmp_path / 'm.ckpt'} -q rtn-a16w8 --eval {text}"
    assert main(command.split()) == 0
    report = json.loads((tmp_path / "slim_report.json").read_text())
    change = report["perplexity_after"] / report["perplexity_before"] - 1
    assert 0 < abs(change) < 0.01


def test_generating(tiny_dir, tmp_path, capsys):
    main(["quantize", str(tiny_dir), str(tmp_path / "m.ckpt"), "-q", "rtn-a16w8"])
    capsys.readouterr()
    texts = []
    for model in (tiny_dir, tmp_path / "m.ckpt"):
        options = ["--max-new-tokens", "5", "--config-from", str(tiny_dir)]
        assert main(["generate", str(model), "The people of", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("The people of")
    assert texts[0] == texts[1]


def test_there_and_back(tiny_dir, tmp_path):
    ckpt, back = tmp_path / "ms" / "model.ckpt", tmp_path / "hf"
    assert main(["convert", str(tiny_dir), str(ckpt)]) == 0
    assert "model.layers.0.attention.wq.weight" in read_ckpt(ckpt)
    assert (tmp_path / "ms" / "config.json").is_file()
    assert main(["convert", str(ckpt), str(back)]) == 0
    source, result = load_tensors(tiny_dir), load_tensors(back)
    assert source.keys() == result.keys()
    for name, array in source.items():
        assert result[name].dtype == array.dtype
        np.testing.assert_array_equal(result[name], array)
    assert (back / "tokenizer.json").read_bytes() == (tiny_dir / "tokenizer.json").read_bytes()


def test_mistakes(config, tiny_dir, float_ckpt, boolq, tmp_path, capsys):
    model, out = str(tiny_dir), str(tmp_path / "out")
    for arguments, message in [
        (["quantize"], "MODEL, OUTPUT and -q are needed"),
        (["quantize", model, out, "-c", config], "either -c CONFIG or MODEL"),
        (["quantize", "-c", tmp_path / "no.yaml", "-q", "ptq"], "no such file"),
        (["quantize", "-c", config, "-q", "ptq"], "there is nothing to do"),
        (["quantize", "-c", config, "-w", "int8"], "has no quantization_config"),
        (["quantize", "-c", config, "-q", "smooth_quant"], "needs calibration data"),
        (["quantize", "-c", config, "-q", "rtn-a16w8", "-w", "int4"], "fixes weight_dtype"),
        (["quantize", "-c", config, "-q", "rtn-c8", "-s", boolq], "-s and -t belong together"),
        (["quantize", model, out, "-q", "ptq", "-w", "int8", "--layout", "gs-ptq"], "--layout"),
        (["quantize", model, out, "-q", "ptq", "-k", "int8", "-kvg", "per_token"], "fixed scales"),
        (["quantize", model, f"{out}.bin", "-q", "rtn-a16w8"], "must end in .ckpt or .safetensors"),
        (["convert", float_ckpt, out], "has no config.json"),
        (["convert", model, tmp_path / "x.bin"], "must end in .ckpt or .safetensors"),
        (["dequantize", float_ckpt, tmp_path / "x.ckpt"], "holds no quantized layer"),
        (["inspect", tmp_path / "none.ckpt"], "no such file"),
    ]:
        fails(capsys, arguments, message)
    assert not (tmp_path / "out").exists()
    config.write_text(config.read_text().replace("LlamaForCausalLM", "GPT2LMHeadModel"))
    fails(capsys, ["quantize", "-c", config, "-q", "rtn-a16w8"], "model.arch.type must be one of")
    config.write_text("- a\n")
    fails(capsys, ["quantize", "-c", config, "-q", "rtn-a16w8"], "must be a mapping")
