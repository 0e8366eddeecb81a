import io
import json
import math
import re
import stat
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from slim_core.errors import CheckpointError, InvalidTypeError, InvalidValueError
from slim_core.report import HTML_FILE, JSON_FILE, LayerReport, Report
from slim_core.report_chart import BarChart, axis, kinds_of
from slim_core.report_console import print_report
from slim_core.report_html import render_html
from slim_core.report_text import (
    describe_perplexity,
    format_bytes,
    format_change,
    format_error,
    format_ratio,
    format_seconds,
)


def layer(name="model.layers.0.mlp.up_proj", weight=0.01, output=None, kind="W8A8", **values):
    scheme = "float" if kind == "FLOAT" else kind.lower()
    return LayerReport(name, scheme, kind, "minmax", (4, 8), 64, 40, weight, output, **values)


def report(*layers, **values):
    facts = {
        "tool": "slim-ptq 1.2.3",
        "model": "tiny",
        "scheme": "w8a8",
        "format": "ascend_v1",
        "bytes_before": 3000,
        "bytes_after": 2000,
    }
    return Report(layers=tuple(layers), **(facts | values))


FULL = report(
    layer("a.0.q_proj", 0.01, 0.02, notes=("range clipped",), seconds=0.25),
    layer("a.1.q_proj", 0.03, 0.01),
    layer("lm_head", 0.0, kind="FLOAT"),
    perplexity_before=24.0,
    perplexity_after=24.12,
    perplexity_text="eval.txt",
    perplexity_tokens=19418,
    calibration={"file": "calib.jsonl", "samples": 64},
    fallbacks=(("lm_head", "left in float: last layer"),),
    seconds={"plan": 0.5, "quantize": 74.5},
    peak_memory=1 << 30,
    provenance={"torch": "2.13.0", "seed": 0},
)


# --- data -----------------------------------------------------------------------------------------


def test_json_round_trip_keeps_everything():
    assert Report.from_json(FULL.to_json()) == FULL
    assert json.loads(FULL.to_json())["report_version"] == 1


number = st.floats(allow_nan=False) | st.integers(0, 10)
text = st.text(max_size=8)


@given(number, st.none() | number, text, st.dictionaries(text, st.none() | text | st.integers()))
def test_json_round_trip_of_any_values(weight, output, name, provenance):
    full = report(
        layer(name, float(weight), None if output is None else float(output), notes=(name,)),
        fallbacks=((name, name),),
        provenance=provenance,
    )
    assert Report.from_json(full.to_json()) == full


def test_json_holds_numbers_that_json_lacks():
    full = report(layer(weight=math.nan), perplexity_after=math.inf)
    back = Report.from_json(full.to_json())
    assert math.isnan(back.layers[0].weight_error)
    assert back.perplexity_after == math.inf


def test_json_turns_other_values_into_text():
    full = report(provenance={"path": np.dtype("int8"), "list": (1, 2)})
    assert json.loads(full.to_json())["provenance"] == {"path": "int8", "list": [1, 2]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("report_version"), "no report_version 1"),
        (lambda c: c.update(report_version=2), "no report_version 1"),
        (lambda c: c.pop("model"), "a report must have the keys tool, model"),
        (lambda c: c.update(extra=1), "a report must have the keys"),
        (lambda c: c.update(model=3), "model of a report is damaged: 3 is not a string"),
        (lambda c: c["layers"][0].update(weight_error="x"), "weight_error of a layer is damaged"),
        (lambda c: c["layers"][0].pop("name"), "a layer must have the keys name, scheme"),
        (lambda c: c.update(layers=[3]), "a layer must have the keys"),
        (lambda c: c.update(fallbacks=[["a", "b", "c"]]), "fallbacks of a report is damaged"),
        (lambda c: c.update(seconds=3), "seconds of a report is damaged"),
    ],
)
def test_damaged_json_names_the_key(change, message):
    content = json.loads(FULL.to_json())
    change(content)
    with pytest.raises(CheckpointError, match=message):
        Report.from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(CheckpointError, match="report"):
        Report.from_json(text)


def test_worst_ranks_by_output_error_only_if_all_have_one():
    assert [item.name for item in FULL.worst(1)] == ["a.0.q_proj"]
    assert FULL.has_output_errors
    mixed = replace(FULL, layers=(*FULL.layers, layer("b", 0.02)))
    assert [item.name for item in mixed.worst(2)] == ["a.1.q_proj", "b"]


def test_worst_puts_nan_first_and_leaves_float_layers_out():
    full = report(layer("a", 0.5), layer("b", math.nan), layer("c", 0.9, kind="FLOAT"))
    assert [item.name for item in full.worst()] == ["b", "a"]
    assert full.worst(0) == ()
    with pytest.raises(InvalidValueError, match="n must be at least 0, not -1"):
        full.worst(-1)
    with pytest.raises(InvalidTypeError, match="n must be int"):
        full.worst(1.5)


# --- files ----------------------------------------------------------------------------------------


def test_save_writes_two_private_files(tmp_path):
    paths = FULL.save(tmp_path)
    assert [path.name for path in paths] == [JSON_FILE, HTML_FILE]
    assert [path.name for path in sorted(tmp_path.iterdir())] == [HTML_FILE, JSON_FILE]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600}
    assert Report.load(tmp_path) == FULL == Report.load(paths[0])
    assert paths[1].read_text(encoding="utf-8") == render_html(FULL)


def test_failed_save_leaves_the_old_report(tmp_path, monkeypatch):
    FULL.save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        report(model="other").save(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (format_bytes(0), "0 B"),
        (format_bytes(1023), "1023 B"),
        (format_bytes(1024), "1.00 KiB"),
        (format_bytes(2_529_608), "2.41 MiB"),
        (format_bytes(1023 * 1024), "1.00 MiB"),
        (format_bytes(140 << 30), "140 GiB"),
        (format_bytes(5000 << 40), "5000 TiB"),
        (format_error(None), "-"),
        (format_error(0.0), "0 %"),
        (format_error(0.00734), "0.734 %"),
        (format_error(1.0), "100 %"),
        (format_error(2e-8), "2e-06 %"),
        (format_error(math.inf), "inf %"),
        (format_change(24.0, 24.12), "+0.50 %"),
        (format_change(24.0, 23.88), "-0.50 %"),
        (format_change(24.0, math.inf), "n/a"),
        (format_change(0.0, 1.0), "n/a"),
        (format_ratio(300, 200), "1.50x smaller"),
        (format_ratio(200, 300), "1.50x larger"),
        (format_ratio(0, 300), "n/a"),
        (format_seconds(0.0123), "12.3 ms"),
        (format_seconds(11.74), "11.7 s"),
        (format_seconds(59.97), "1 min 0 s"),
        (format_seconds(75), "1 min 15 s"),
        (format_seconds(7384), "2 h 3 min"),
    ],
)
def test_numbers_as_people_read_them(got, wanted):
    assert got == wanted


def test_perplexity_in_words():
    assert describe_perplexity(FULL) == "24 -> 24.12 (+0.50 %) on eval.txt, 19,418 tokens"
    assert describe_perplexity(report()) is None
    assert describe_perplexity(report(perplexity_after=3.25)) == "3.25 after"


@given(st.floats(1e-9, 10.0))
def test_axis_covers_the_peak_in_few_round_steps(peak):
    top, step = axis(peak)
    assert top >= peak * (1 - 1e-6)
    assert 2 <= round(top / step) <= 6
    assert float(f"{step:.0e}") == pytest.approx(step)
    assert f"{step:.0e}"[0] in "125"


# --- console --------------------------------------------------------------------------------------


def printed(full, **options):
    stream = io.StringIO()
    print_report(full, Console(file=stream, **options))
    return stream.getvalue()


def test_console_summary_in_a_pipe():
    lines = [line.rstrip() for line in printed(FULL).splitlines()]
    assert lines[:6] == [
        "model       tiny",
        "scheme      w8a8, format ascend_v1 (slim-ptq 1.2.3)",
        "layers      2 W8A8, 1 FLOAT",
        "size        2.93 KiB -> 1.95 KiB, 1.50x smaller",
        "perplexity  24 -> 24.12 (+0.50 %) on eval.txt, 19,418 tokens",
        "time        1 min 15 s, peak memory 1.00 GiB",
    ]
    assert "Layers with the largest output error" in lines
    assert any(re.fullmatch(r"a\.0\.q_proj +W8A8 +1\.00 % +2\.00 %", line) for line in lines)
    assert "Fallbacks (1)" in lines
    assert "lm_head  left in float: last layer" in lines
    assert all(len(line) <= 80 and "\x1b" not in line for line in lines)


def test_console_folds_long_names_and_shortens_long_lists():
    long = "transformer.encoder.layers.11.mlp.experts.127.expert_projection.down_proj"
    full = report(
        *(layer(f"{long}.{i}", kind="W8A8_DYNAMIC", output=0.1) for i in range(3)),
        fallbacks=tuple((f"layer{i}", "[red]why[/red]") for i in range(14)),
    )
    text = printed(full, width=80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "layer9 " in text
    assert "layer10" not in text
    assert "... and 4 more" in text
    assert "[red]why[/red]" in text
    table = text[text.index("──") : text.index("Fallbacks")]
    pieces = [line.split("  ")[0].rstrip() for line in table.splitlines()[1:]]
    assert f"{long}.0" in "".join(pieces)


def test_console_prints_ascii_where_nothing_else_fits():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_report(FULL, Console(file=stream))
    stream.flush()
    assert b"a.0.q_proj" in stream.buffer.getvalue()


def test_console_without_layers():
    assert "layers      none" not in printed(FULL)
    assert "layers  none" in printed(report())


# --- HTML -----------------------------------------------------------------------------------------


class Balance(HTMLParser):
    """Fails on an end tag that does not close the element that is open."""

    VOID = frozenset({"meta"})

    def __init__(self):
        super().__init__()
        self.open = []
        self.texts = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in ("rect", "path")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def texts_of(page):
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser.texts


def svgs(page):
    return [ET.fromstring(text) for text in re.findall(r'<svg class="chart".*?</svg>', page)]


def many(count):
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    return [
        layer(f"model.layers.{i // 4}.{names[i % 4]}", 0.001 * (1 + i % 7), 0.002 * (1 + i % 5))
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, 28, 300])
def test_page_is_well_formed_and_lists_every_layer(count):
    full = replace(FULL, layers=tuple(many(count)))
    texts = texts_of(render_html(full))
    for item in full.layers:
        assert item.name in texts
    assert full.model in texts


def test_page_needs_nothing_from_outside():
    page = render_html(replace(FULL, layers=tuple(many(28))))
    assert "default-src 'none'" in page
    for word in ("http:", "https:", "src=", "href=", "url(", "@import", "<script", "<link"):
        assert word not in page


def test_nested_facts_are_phrases():
    full = report(provenance={"packages": {"numpy": "2.1", "torch": "2.13"}, "argv": ["a", "b"]})
    texts = texts_of(render_html(full))
    assert "numpy 2.1, torch 2.13" in texts
    assert "a, b" in texts


def test_names_are_escaped_everywhere():
    evil = "<img src=x onerror='1'>\"&"
    full = report(
        layer(evil, 0.1, 0.2, notes=(evil,)),
        tool=evil,
        model=evil,
        scheme=evil,
        format=evil,
        perplexity_after=1.0,
        perplexity_text=evil,
        calibration={evil: evil},
        fallbacks=((evil, evil),),
        seconds={evil: 1.0},
        provenance={evil: evil},
    )
    page = render_html(replace(full, layers=(replace(full.layers[0], type=evil, method=evil),)))
    assert "<img" not in page
    assert texts_of(page).count(evil) >= 10
    assert len(svgs(page)) == 2


def test_bars_are_proportional_to_the_errors():
    layers = many(28)
    chart = svgs(render_html(report(*layers)))[0]
    bars = chart.findall("rect")
    assert len(bars) == 28
    heights = np.array([float(bar.get("height")) for bar in bars])
    errors = np.array([item.weight_error for item in layers])
    # The axis ends at a round number at or above the largest error.
    top, _ = axis(errors.max())
    np.testing.assert_allclose(heights, errors / top * 160, atol=0.02)
    assert bars[3].find("title").text == "model.layers.0.mlp.down_proj: 0.400 % (W8A8)"
    xs = np.array([float(bar.get("x")) for bar in bars])
    widths = np.array([float(bar.get("width")) for bar in bars])
    assert (np.diff(xs) > widths[:-1]).all()
    assert xs[-1] + widths[-1] <= 1040


def test_second_chart_only_if_output_errors_were_measured():
    assert len(svgs(render_html(report(layer(output=0.1), layer("b"))))) == 2
    assert len(svgs(render_html(report(layer(), layer("b"))))) == 1
    second = svgs(render_html(report(layer(output=0.1), layer("b"))))[1]
    assert len(second.findall("rect")) == 1


@pytest.mark.parametrize("error", [math.nan, math.inf, 0.0])
def test_errors_that_have_no_height(error):
    page = render_html(report(layer("bad", error), layer("good", 0.01)))
    bars = svgs(page)[0].findall("rect")
    heights = [float(bar.get("height")) for bar in bars]
    assert heights[0] == (0.0 if error == 0 else 160.0)
    assert heights[1] == 160.0
    texts_of(page)


def test_many_kinds_of_layers_share_the_last_colour():
    names = [*(f"block.0.kind{i}" for i in range(12)), "block.1.kind11"]
    kinds = kinds_of(names)
    assert len(kinds) == 9
    assert kinds["other"] == 8
    assert "kind11" in kinds
    chart = ET.fromstring(BarChart("t", [0.1] * 13).render(names, kinds, names))
    assert sum(bar.get("class") == "k8" for bar in chart.findall("rect")) == 4


def test_block_numbers_stand_below_their_layers():
    chart = svgs(render_html(report(*many(300))))[0]
    labels = [text.text for text in chart.findall("text") if not (text.text or "").endswith("%")]
    assert labels[0] == "block 0"
    assert labels[1:] == [str(5 * i) for i in range(1, 15)]
