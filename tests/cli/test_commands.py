import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import arbllm
from arbllm.binarize.methods import METHODS
from arbllm.cli.app import app
from arbllm.config import PARTITIONS
from tests.tiny import pack_tiny, save_tiny

TEXT = ["--calibration", "builtin", "--windows", "4", "--window-length", "64", "--device", "cpu"]
COMMANDS = ("quantize", "distill", "eval", "generate", "inspect", "verify", "export")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return pack_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def dense(packed) -> Path:
    return packed.parent / "dense"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def fail(*arguments: object) -> str:
    """The message of a command that must end with one readable line and exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert lines == result.stderr.splitlines()[-1:]
    return lines[0]


def test_quantize_prints_what_it_made(dense, tmp_path):
    result = succeed("quantize", dense, tmp_path / "packed", *TEXT)
    assert "true bits a weight" in result.stdout
    assert "arbllm generate" in result.stdout
    assert "block 2/2" in result.stderr


def test_quantize_json_is_one_object_and_progress_goes_to_stderr(dense, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("word " * 60)
    result = succeed("quantize", dense, tmp_path / "packed", *TEXT, "--json", "--evaluate", text)
    values = json.loads(result.stdout)
    assert "block 2/2" in result.stderr
    wanted = ("perplexity", "true_bits_per_weight", "nominal_bits_per_weight", "bytes_on_disk", "seconds")
    assert all(values[key] > 0 for key in (*wanted, "peak_memory_bytes"))
    assert values["bytes_on_disk"] == (tmp_path / "packed" / "model.safetensors").stat().st_size


def test_distill(dense, packed, tmp_path):
    options = ("--model", dense, "--steps", 1, "--device", "cpu")
    shown = succeed("distill", packed, tmp_path / "distilled", *options)
    assert re.search(r"divergence before +\d\.\d{4} nats a token on held-out text", shown.stdout)
    assert "distilled from" in shown.stderr
    other = ("--calibration", "builtin", "--windows", 5, "--window-length", 32, "--seed", 3, "--overwrite", "--json")
    values = json.loads(succeed("distill", packed, tmp_path / "distilled", *options, *other).stdout)
    assert values["divergence_after"] <= values["divergence_before"]
    config = json.loads((tmp_path / "distilled" / "config.json").read_text())["quantization_config"]
    text = {"text": "builtin", "windows": 5, "window_length": 32, "seed": 3}
    assert config["calibration"]["distillation"] == text
    assert "choose another output directory" in fail("distill", packed, packed, *options)


def test_every_option_of_the_method_reaches_the_checkpoint(dense, tmp_path):
    options = {
        "method": "arb-x", "partition": "group", "groups": 4, "iterations": 3, "block_size": 16,
        "split_on": "saliency", "compensation": "reference", "damping": 0.02,
    }  # fmt: skip
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    succeed("quantize", dense, tmp_path / "packed", *TEXT, *flags, "--seed", 5)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config["binarization"].items() >= options.items()
    steps = {"tune": 0, "distill": 0}
    assert config["calibration"] == {"text": "builtin", "windows": 4, "window_length": 64, "seed": 5, **steps}


def test_embeddings_in_8_bits(dense, tmp_path):
    succeed("quantize", dense, tmp_path / "packed", *TEXT, "--embeddings", 8)
    assert re.search(r"embeddings and head +17.5 kB, in 8 bits", succeed("inspect", tmp_path / "packed").stdout)
    values = json.loads(succeed("inspect", tmp_path / "packed", "--json").stdout)
    assert values["rounded_embeddings"] == ["lm_head", "model.embed_tokens"]
    assert succeed("generate", tmp_path / "packed", "The", "--max-new-tokens", 3, "--device", "cpu").stdout
    assert "--embeddings" in fail("quantize", dense, tmp_path / "other", *TEXT, "--embeddings", 5)


def test_the_defaults_are_those_of_the_library(dense, tmp_path):
    succeed("quantize", dense, tmp_path / "packed", *TEXT)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config["binarization"] == arbllm.BinarizationConfig().to_dict()


def test_eval_agrees_for_packed_and_exported(packed, tmp_path):
    succeed("export", packed, tmp_path / "dense")
    options = ("--text", "builtin", "--context", 64, "--max-windows", 5, "--device", "cpu", "--json")
    values = [json.loads(succeed("eval", model, *options).stdout) for model in (packed, tmp_path / "dense")]
    assert values[0]["perplexity"] == pytest.approx(values[1]["perplexity"], rel=1e-4)
    assert values[0]["true_bits_per_weight"] > values[0]["nominal_bits_per_weight"] >= 1
    assert "true_bits_per_weight" not in values[1]
    assert values[0]["bytes_on_disk"] < values[1]["bytes_on_disk"]
    assert all(value["windows"] == 5 and value["peak_memory_bytes"] > 0 for value in values)


def test_options_of_tasks_without_a_task(packed):
    assert "limit and task_data are for tasks" in fail("eval", packed, "--text", "builtin", "--limit", 3)


def test_eval_prints_a_table(packed):
    result = succeed("eval", packed, "--text", "builtin", "--context", 64, "--max-windows", 2)
    assert re.search(r"perplexity +\d+\.\d+", result.stdout)
    assert "2 of 64 tokens" in result.stdout


def test_generate(packed):
    values = json.loads(succeed("generate", packed, "Hello", "--max-new-tokens", 4, "--json").stdout)
    assert succeed("generate", packed, "Hello", "--max-new-tokens", 4).stdout == f"Hello{values['text']}\n"
    for option in (("--max-new-tokens", 0), ("--temperature", "nan")):
        refused = CliRunner().invoke(app, list(map(str, ("generate", packed, "Hello", *option))))
        assert (refused.exit_code, refused.stdout) == (2, "")
    assert values["seconds"] > 0


def test_inspect(packed):
    shown = succeed("inspect", packed).stdout
    values = json.loads(succeed("inspect", packed, "--json").stdout)
    for linear in values["linears"]:
        assert re.search(rf"{linear['name']} .* {linear['true_bits']:.3f} .* {linear['bytes']:,}\s*\n", shown)
    assert values["linear_bytes"] == sum(linear["bytes"] for linear in values["linears"])
    tensors = load_file(packed / "model.safetensors")
    assert values["embedding_bytes"] == sum(
        tensor.nbytes for name, tensor in tensors.items() if name in ("model.embed_tokens.weight", "lm_head.weight")
    )
    total = values["linear_bytes"] + values["embedding_bytes"] + values["other_bytes"]
    assert total == sum(tensor.nbytes for tensor in tensors.values()) <= values["bytes_on_disk"]


def test_inspect_lists_the_blocks_in_order(tmp_path):
    pack_tiny(tmp_path, layers=11, hidden_size=16)
    values = json.loads(succeed("inspect", tmp_path / "packed", "--json").stdout)
    blocks = [int(linear["name"].split(".")[2]) for linear in values["linears"]]
    assert blocks == sorted(blocks)


def test_export_json(packed, tmp_path):
    values = json.loads(succeed("export", packed, tmp_path / "dense", "--dtype", "float16", "--json").stdout)
    assert values["bytes_on_disk"] == (tmp_path / "dense" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command):
    result = succeed(command, "--help")
    assert f"arbllm {command} " in result.stdout
    assert "--json" in result.stdout
    assert "--debug" in result.stdout


def test_help_names_every_method_and_partition():
    result = CliRunner().invoke(app, ["quantize", "--help"], env={"COLUMNS": "300"})
    words = set(re.findall(r"[a-z+-]+", result.stdout))
    assert {*METHODS, *PARTITIONS} <= words


def test_version():
    assert succeed("--version").stdout == f"arbllm {arbllm.__version__}\n"


# Everything that a newcomer gets wrong.


def test_wrong_model_path(tmp_path):
    assert "no such file" in fail("quantize", tmp_path / "nothing.gguf", tmp_path / "out", *TEXT)
    assert "no such file" in fail("eval", tmp_path / "nothing" / "at" / "all", "--text", "builtin")


def test_a_directory_that_is_no_model(tmp_path):
    assert "config.json" in fail("generate", tmp_path, "Hello")


def test_wrong_method(dense, tmp_path):
    message = fail("quantize", dense, tmp_path / "out", *TEXT, "--method", "arb-y")
    assert "arb-y" in message
    assert "arb-rc" in message


@pytest.mark.parametrize(
    "option", [("--partition", "x"), ("--groups", 3), ("--block-size", 0), ("--iterations", -1), ("--damping", 0)]
)
def test_wrong_option(dense, tmp_path, option):
    assert option[0].strip("-").replace("-", "_") in fail("quantize", dense, tmp_path / "out", *TEXT, *option)


def test_empty_and_short_text(dense, packed, tmp_path):
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.touch()
    short.write_text("word " * 40)
    arguments = ("quantize", dense, tmp_path / "out", *TEXT)
    assert "empty" in fail(*arguments, "--calibration", empty)
    assert "3 windows of 64" in fail(*arguments, "--calibration", short)
    short.write_text("word " * 20)
    assert "100 tokens" in fail("eval", packed, "--text", short, "--context", 101)


def test_existing_output_directory(dense, packed):
    for arguments in (("quantize", dense, packed, *TEXT), ("export", packed, dense)):
        assert "--overwrite" in fail(*arguments)


def test_one_flipped_byte(packed, tmp_path):
    damaged = shutil.copytree(packed, tmp_path / "damaged")
    file = damaged / "model.safetensors"
    octets = bytearray(file.read_bytes())
    octets[-100] ^= 1
    file.write_bytes(octets)
    for arguments in (("inspect", damaged), ("eval", damaged, "--text", "builtin"), ("generate", damaged, "Hello")):
        assert "checksum" in fail(*arguments)
    assert "model.safetensors: tensor" in fail("verify", damaged)


def test_a_file_in_the_place_of_its_directory(packed):
    for command in ("verify", "inspect"):
        assert "is a file; give the directory" in fail(command, packed / "model.safetensors")


def test_verify(packed):
    values = json.loads(succeed("verify", packed, "--json").stdout)
    assert (values["sound"], values["files"], values["linears"]) == (True, 1, 14)
    assert values["tensors"] == len(load_file(packed / "model.safetensors"))
    assert "sound" in succeed("verify", packed).stdout


def test_weights_that_are_not_numbers(tmp_path):
    save_tiny(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0, 0] = torch.inf
    model.save_pretrained(tmp_path / "dense")
    message = fail("quantize", tmp_path / "dense", tmp_path / "out", *TEXT)
    assert "model.layers.0.self_attn.k_proj" in message


def test_inspecting_a_dense_model(dense):
    assert "not a packed checkpoint" in fail("inspect", dense)


def test_an_unexpected_error_is_one_line_too(packed, monkeypatch):
    def explode(*_, **__):
        raise RuntimeError("line one\nline two")

    monkeypatch.setattr("arbllm.format.report.report", explode)
    assert fail("inspect", packed) == "error: RuntimeError: line one line two (--debug shows where)"
    assert isinstance(run("inspect", packed, "--debug").exception, RuntimeError)


def test_a_warning_is_one_line_and_other_libraries_are_quiet(packed, monkeypatch):
    def warn(*_, **__):
        warnings.warn_explicit("raised the damping", UserWarning, "solver.py", 1, module="arbllm.solver")
        warnings.warn_explicit("of no interest", UserWarning, "other.py", 1, module="other")
        raise arbllm.CheckpointError("stop")

    monkeypatch.setattr("arbllm.format.report.report", warn)
    assert run("inspect", packed).stderr == "warning: raised the damping\nerror: stop\n"


def test_an_interrupted_command(packed, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("arbllm.format.report.report", interrupt)
    result = run("inspect", packed)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_an_infinite_perplexity_is_null_in_json(packed, monkeypatch):
    monkeypatch.setattr("arbllm.model.perplexity._exp", lambda _: float("inf"))
    options = ("--text", "builtin", "--context", 64, "--max-windows", 1)
    assert json.loads(succeed("eval", packed, *options, "--json").stdout)["perplexity"] is None


def test_usage_errors_end_with_2():
    assert run("quantize").exit_code == 2
    assert run("nonsense").exit_code == 2
    assert run("eval", "model", "--context", "many").exit_code == 2


# As a process: what is imported, exit codes, and clean streams.


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "arbllm", *(str(argument) for argument in arguments)]
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys; sys.argv = ['arbllm', 'quantize', '--help']\n"
        "try:\n    from arbllm.cli import main; main()\n"
        "finally:\n    print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[]"


def test_as_a_process(packed):
    done = process("eval", packed, "--text", "builtin", "--context", "64", "--max-windows", "2", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["windows"] == 2
    lines = [line.split(":")[0] for line in done.stderr.splitlines()]
    assert lines == [f"opening {packed}", "window 1/2", "window 2/2"]


def test_a_terminated_process_cleans_up(packed, tmp_path):
    words = ("quantize", packed.parent / "dense", tmp_path / "out", *TEXT, "--iterations", 10**9, "--windows", 100)
    command = [sys.executable, "-m", "arbllm", *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr
        assert "opening" in running.stderr.readline()
        assert "linears" in running.stderr.readline()
        assert list(tmp_path.iterdir()) != []
        running.terminate()
        assert running.stderr.read().splitlines()[-1] == "interrupted"
    assert running.returncode == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_reader_that_has_read_enough_is_no_failure(packed, command):
    words = [sys.executable, "-m", "arbllm", command, str(packed)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout
        assert running.stderr
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 0


def test_an_error_as_a_process(tmp_path):
    done = process("inspect", tmp_path / "nothing")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_traceback_on_demand(tmp_path):
    done = process("inspect", tmp_path / "nothing", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "CheckpointError" in done.stderr
