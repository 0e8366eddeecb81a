import subprocess
import sys

BLOCKED = """
import sys
sys.modules["mindspore"] = None  # what an import finds where MindSpore is not installed
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_no_framework():
    out = run(
        "import sys, slim_mindspore, slim_mindspore.cli\n"
        "slim_mindspore.QuantConfig(fraction=0.03)\n"
        "slim_mindspore.QuantizationConfig.build(quant_method='rtn', weight_dtype='int8')\n"
        "heavy = ('mindspore', 'torch', 'mindformers', 'tokenizers')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert out.strip() == "[]"


def test_without_mindspore_the_extra_is_named():
    out = run(
        BLOCKED
        + "import slim_mindspore\n"
        + "from slim_core.errors import MissingDependencyError\n"
        + "for name in ('Calibrator', 'Decompose', 'quantize_network'):\n"
        + "    try:\n"
        + "        getattr(slim_mindspore, name)\n"
        + "    except MissingDependencyError as error:\n"
        + "        print(isinstance(error, ModuleNotFoundError))\n"
        + "        print('slim-mindspore[mindspore]' in str(error))\n"
    )
    assert out.split() == ["True"] * 6


def test_files_need_no_mindspore(tmp_path, tiny_dir):
    run(
        BLOCKED
        + "from slim_mindspore.cli import main\n"
        + f"assert main(['convert', {str(tiny_dir)!r}, {str(tmp_path / 'm.ckpt')!r}]) == 0\n"
        + f"assert main(['inspect', {str(tmp_path / 'm.ckpt')!r}]) == 0\n"
    )


def test_unknown_names():
    import slim_mindspore

    assert "Calibrator" in dir(slim_mindspore)
    assert not hasattr(slim_mindspore, "Calibrate")
