import importlib
import sys

import pytest

JOB = {
    "dense_bytes": 269_030_016,
    "dense_linear_bytes": 212_336_640,
    "bytes_on_disk": 95_000_000,
    "linear_bytes": 38_000_000,
    "true_bits_per_weight": 2.912,
    "nominal_bits_per_weight": 1.0623,
    "seconds": 200.4,
    "peak_memory_bytes": 1_040_000_000,
}


@pytest.fixture
def demo(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    yield importlib.import_module("demo")
    for name in ("demo", "commands"):
        sys.modules.pop(name, None)


@pytest.fixture
def rows(demo):
    return demo.comparison(JOB, {"perplexity": 12.345, "seconds": 61.2}, {"perplexity": 45.678, "seconds": 63.9})


def test_the_table_is_shown(demo, rows, capsys):
    demo.show(rows, {"original": " is [bold]", "binarized": " was"})
    shown = capsys.readouterr().out
    for expected in ("12.35", "45.68", "269,030,016", "95,000,000", "2.91", "1.06", "1.04 GB", "is [bold]"):
        assert expected in shown


def test_the_readme_is_updated_between_its_marks_alone(demo, rows, tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{demo.BEGIN}old\n{demo.END}below\n")
    monkeypatch.setattr(demo, "README", readme)
    demo.update_readme(rows, {"original": " is\nnice", "binarized": " was"})
    text = readme.read_text()
    assert text.startswith(f"above\n{demo.BEGIN}")
    assert text.endswith(f"{demo.END}below\n")
    assert "old" not in text
    assert "| perplexity, held-out text | 12.35 | 45.68 |\n" in text
    assert f"````text\n{demo.PROMPT} is\nnice\n````\n" in text  # samples may hold fences of three


def test_the_readme_has_the_marks(demo):
    text = demo.README.read_text()
    assert text.index(demo.BEGIN) < text.index(demo.END)
