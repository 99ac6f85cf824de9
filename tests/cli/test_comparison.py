"""The commands that compare: peer, eval with tasks, compare, ablate, analyze."""

import json
import re

import pytest

from arbllm.evaluation import compare as comparison
from tests.cli.test_commands import fail, succeed
from tests.tiny import save_tiny

TEXT = ("--calibration", "builtin", "--windows", 4, "--window-length", 64)
COMMANDS = ("peer", "compare", "ablate", "analyze")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "dense")


@pytest.fixture
def in_this_process(monkeypatch):
    """Steps in processes of their own import everything anew, which takes seconds each."""
    monkeypatch.setattr(comparison, "isolated", lambda function, *arguments: function(*arguments))


def test_peer(dense, tmp_path):
    values = json.loads(succeed("peer", dense, tmp_path / "out", "--method", "rtn-3", *TEXT, "--json").stdout)
    assert values["true_bits_per_weight"] > values["nominal_bits_per_weight"] == 3
    assert "size if packed" in succeed("peer", dense, tmp_path / "out", *TEXT, "--overwrite").stdout
    assert "gptq-2" in fail("peer", dense, tmp_path / "out2", "--method", "gptq-5", *TEXT)


def test_eval_of_several_texts_and_tasks(dense, tmp_path):
    (tmp_path / "one.txt").write_text("one " * 40)
    (tmp_path / "two.txt").write_text("two " * 40)
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "valid.jsonl").write_text(2 * '{"goal": "a", "sol1": "b", "sol2": "c"}\n')
    (tmp_path / "piqa" / "valid-labels.lst").write_text("0\n1\n")
    texts = f"{tmp_path / 'one.txt'},{tmp_path / 'two.txt'}"
    options = ("--context", 64, "--tasks", "piqa", "--task-data", tmp_path, "--device", "cpu")
    values = json.loads(succeed("eval", dense, "--text", texts, *options, "--json").stdout)
    assert list(values["texts"]) == texts.split(",")
    assert "perplexity" not in values
    assert values["tasks"][0]["acc"] == values["average_acc"] == 0.5
    shown = succeed("eval", dense, *options).stdout
    assert "0.500 ± 0.500" in shown
    alone = succeed("eval", dense, *options, "--limit", 1).stdout
    assert re.search(r"piqa +[01]\.000, normalized [01]\.000 \(1 items\)", alone)
    (tmp_path / "piqa" / "one.txt").write_text("another " * 40)
    both = f"{tmp_path / 'one.txt'},{tmp_path / 'piqa' / 'one.txt'}"
    lines = succeed("eval", dense, "--text", both, "--context", 64, "--device", "cpu").stdout
    assert all(f"perplexity, {name}" in lines for name in both.split(","))
    assert "perplexity" not in shown
    assert "riddles" in fail("eval", dense, "--tasks", "riddles", "--task-data", tmp_path)


@pytest.mark.usefixtures("in_this_process")
def test_compare(dense, tmp_path):
    words: tuple = ("compare", dense, "--methods", "fp16,rtn-2", *TEXT, "--text", "builtin", "--context", 64)
    words = (*words, "--max-windows", 1, "--device", "cpu", "--out", tmp_path / "out")
    first = succeed(*words)
    assert "no method of the same true bits or fewer" in first.stdout
    assert "rtn-2 quantize" in first.stderr
    again = succeed(*words, "--json")
    assert "quantize" not in again.stderr
    assert [row["method"] for row in json.loads(again.stdout)["rows"]] == ["fp16", "rtn-2"]
    row = tmp_path / "out" / "rows" / "rtn-2.json"
    values = json.loads(row.read_text())
    values["texts"]["builtin"]["0-1"]["perplexity"] = None  # as that of a model that has collapsed is kept
    row.write_text(json.dumps(values))
    assert json.loads(succeed(*words, "--json").stdout)["rows"][1]["perplexity"] == {"builtin": None}
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    assert "seed" in fail(*words, "--seed", 1)
    assert "arb-y" in fail("compare", dense, "--methods", "arb-y", "--out", tmp_path / "other")


@pytest.mark.usefixtures("in_this_process")
def test_ablate(dense, tmp_path):
    words = ("ablate", dense, "--studies", "iterations", *TEXT, "--text", "builtin", "--context", 64)
    shown = succeed(*words, "--max-windows", 1, "--device", "cpu", "--out", tmp_path / "out").stdout
    assert shown.startswith("# Ablations on dense")
    assert shown.count("iterations, arb-rc") == 3


def test_analyze(dense, tmp_path):
    words = ("analyze", dense, *TEXT, "--linear", "model.layers.0.mlp.up_proj", "--out", tmp_path / "out")
    values = json.loads(succeed(*words, "--json").stdout)
    assert [method["method"] for method in values["methods"]] == ["billm", "arb", "arb-x", "arb-rc", "arb-rcx"]
    assert (tmp_path / "out" / "column-deviation.md").read_text().startswith("# Column deviation: dense")
    assert "no linear" in fail(*words[:-4], "--linear", "nonsense", "--out", tmp_path / "out")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command):
    result = succeed(command, "--help")
    assert f"arbllm {command} " in result.stdout
    assert "--json" in result.stdout
