import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from arbllm.difference import output_error
from arbllm.errors import ArbllmError, ConfigError, TextError
from arbllm.evaluation import compare as module
from arbllm.evaluation import steps as steps_module
from arbllm.evaluation.compare import (
    RESULTS,
    collect,
    compare,
    perplexities,
    text_pieces,
)
from arbllm.evaluation.evaluate import Evaluation, evaluate
from arbllm.evaluation.methods import DISTILLATION_STEPS, PARTS, Calibration, find_recipe
from arbllm.evaluation.peers import find_peer
from arbllm.evaluation.protocol import ROWS, Protocol, merged_settings
from arbllm.evaluation.steps import isolated
from arbllm.factor import factorize
from arbllm.format.checkpoint import bytes_on_disk
from arbllm.integrations.hqq import hqq_round
from arbllm.model.perplexity import NotFiniteError
from tests.tiny import save_tiny

METHODS = ("fp16", "hqq-4", "arb-rc", "arb-rcx-1.6-untuned")


@pytest.fixture(scope="module")
def protocol(tmp_path_factory) -> Protocol:
    model = save_tiny(tmp_path_factory.mktemp("tiny") / "dense")
    calibration = Calibration("builtin", 4, 64, 0, "cpu")
    return Protocol(str(model), calibration, texts=("builtin",), context=64, max_windows=2)


@pytest.fixture(scope="module")
def finished(protocol, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison") / "out"
    return out, compare(protocol, METHODS, out, keep_models=True, isolate=False)


def test_a_row_holds_what_the_commands_would_tell(protocol, finished):
    out, results = finished
    assert [row["method"] for row in results["rows"]] == list(METHODS)
    for row in results["rows"]:
        model = protocol.model if row["method"] == "fp16" else str(out / "models" / row["method"])
        expected = evaluate(model, ["builtin"], context=64, max_windows=2, device="cpu")
        assert row["perplexity"] == {"builtin": pytest.approx(expected.texts["builtin"].perplexity)}
        assert row["tokens_per_second"] > 0
        assert len(row["samples"]) == 3
        assert sum(row["parts"].values()) == row["bytes"]
        assert list(row["parts"]) == list(PARTS)
        if row["family"].startswith("arb"):
            assert row["bytes"] == bytes_on_disk(out / "models" / row["method"])
            assert row["true_bits"] == pytest.approx(expected.true_bits_per_weight)
            assert len(row["output_errors"]) == 14
    full, hqq, _, joint = results["rows"]
    assert full["true_bits"] == 32
    # Rows of 32 columns in groups of 32, of 64 in groups of 64, with 32 bits a group.
    assert hqq["true_bits"] == pytest.approx((7168 * 5 + 2048 * 4.5) / 9216)
    assert joint["true_bits"] <= 1.6


def test_a_second_run_does_nothing_but_what_is_missing(protocol, finished, monkeypatch):
    out, results = finished
    steps: list[tuple[str, str]] = []
    row = out / ROWS / "arb-rc.json"
    values = json.loads(row.read_text())
    del values["speed"]
    row.write_text(json.dumps(values))
    pieces = text_pieces(protocol)
    found = collect(protocol, pieces, out, METHODS)["rows"]
    assert [row["method"] for row in found] == ["fp16", "hqq-4", "arb-rcx-1.6-untuned"]
    again = compare(protocol, METHODS, out, keep_models=True, isolate=False, on_step=lambda *step: steps.append(step))
    assert steps == [("arb-rc", "speed")]
    assert again == json.loads((out / RESULTS).read_text())
    for one, other in zip(results["rows"], again["rows"], strict=True):
        assert one["perplexity"] == other["perplexity"]
    compare(protocol, ["fp16"], out, keep_models=True, isolate=False, on_step=lambda *step: steps.append(step))
    assert steps == [("arb-rc", "speed")]
    assert {row["method"] for row in collect(protocol, pieces, out, ["fp16"])["rows"]} == set(METHODS)


def test_a_distillation_goes_on_from_the_tuned_model(protocol, tmp_path, monkeypatch):
    monkeypatch.setattr("arbllm.evaluation.methods.DISTILLATION_STEPS", 2)
    steps: list[tuple[str, str]] = []
    options = {"isolate": False, "on_step": lambda *step: steps.append(step)}
    tuned, distilled = "arb-rcx-3", "arb-rcx-3-distilled"
    [row] = compare(protocol, [distilled], tmp_path, **options)["rows"]
    assert steps == [(tuned, "quantize"), *((distilled, step) for step in ("quantize", "texts builtin 0-2", "speed"))]
    assert not any((tmp_path / "models").iterdir())
    before = json.loads((tmp_path / ROWS / f"{tuned}.json").read_text())["quantize"]
    assert row["seconds"] > before["seconds"]
    steps.clear()
    one, other = compare(protocol, [tuned, distilled], tmp_path, **options)["rows"]
    assert [step for step in steps if step[1] == "quantize"] == [(tuned, "quantize")]
    assert (one["method"], other) == (tuned, row)
    assert not any((tmp_path / "models").iterdir())


def test_a_distillation_reads_as_many_windows_as_asked_for(protocol, tmp_path, monkeypatch):
    monkeypatch.setattr("arbllm.evaluation.methods.DISTILLATION_STEPS", 1)
    more = replace(protocol, calibration=replace(protocol.calibration, distill_windows=6))
    compare(more, ["arb-rcx-3-distilled"], tmp_path, isolate=False, keep_models=True)
    config = json.loads((tmp_path / "models" / "arb-rcx-3-distilled" / "config.json").read_text())
    calibration = config["quantization_config"]["calibration"]
    assert (calibration["windows"], calibration["distillation"]["windows"]) == (4, 6)


def test_an_interruption_keeps_the_steps_before_it(protocol, tmp_path, monkeypatch):
    def stop(*_: object) -> dict:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(steps_module, "_speed", stop)
        with pytest.raises(KeyboardInterrupt):
            compare(protocol, ["rtn-2"], tmp_path, isolate=False)
    assert set(json.loads((tmp_path / ROWS / "rtn-2.json").read_text())) == {"quantize", "texts"}
    steps: list[tuple[str, str]] = []
    compare(protocol, ["rtn-2"], tmp_path, isolate=False, on_step=lambda *step: steps.append(step))
    assert steps == [("rtn-2", "speed")]
    assert not (tmp_path / "models" / "rtn-2").exists()


def test_more_of_a_text_is_added_to_what_is_there(protocol, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 2)
    steps: list[str] = []
    first = replace(protocol, max_windows=3)
    options = {"keep_models": True, "isolate": False, "on_step": lambda _, step: steps.append(step)}
    compare(first, ["arb-rc"], tmp_path, **options)
    assert steps == ["quantize", "texts builtin 0-2", "texts builtin 2-3", "speed"]
    steps.clear()
    [row] = compare(replace(first, max_windows=4), ["arb-rc"], tmp_path, **options)["rows"]
    assert steps == ["texts builtin 2-4"]
    whole = evaluate(str(tmp_path / "models" / "arb-rc"), ["builtin"], context=64, max_windows=4, device="cpu")
    assert row["perplexity"]["builtin"] == pytest.approx(whole.texts["builtin"].perplexity)


def test_a_collapsed_piece_makes_a_collapsed_text(protocol):
    done = {
        "texts": {"builtin": {"0-2": {"perplexity": 20.0, "windows": 2}, "2-3": {"perplexity": None, "windows": 1}}}
    }
    assert perplexities(protocol, {"builtin": [(0, 2), (2, 3)]}, done) == {"builtin": float("inf")}


def test_what_another_checkpoint_gave_is_not_mixed_in(protocol, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 2)
    steps: list[str] = []
    options = {"isolate": False, "on_step": lambda _, step: steps.append(step)}
    compare(protocol, ["arb-rc"], tmp_path, **options)
    more = replace(protocol, max_windows=4)
    steps.clear()
    compare(more, ["arb-rc"], tmp_path, **options)  # the checkpoint was deleted, and is made anew as it was
    assert steps == ["quantize", "texts builtin 2-4"]
    file = tmp_path / ROWS / "arb-rc.json"
    values = json.loads(file.read_text())
    values["quantize"]["checkpoint"] = "of another processor"
    file.write_text(json.dumps(values))
    steps.clear()
    compare(replace(protocol, max_windows=6), ["arb-rc"], tmp_path, **options)
    assert steps == ["quantize", *(f"texts builtin {start}-{start + 2}" for start in (0, 2, 4)), "speed"]


def test_a_collapsed_model_has_a_row_and_others_follow(protocol, tmp_path, monkeypatch):
    def collapsed(model: str, *arguments: object, **options: object) -> Evaluation:
        if "rtn-2" in model:
            raise NotFiniteError("the model's logits are not finite")
        return evaluate(model, *arguments, **options)

    monkeypatch.setattr(steps_module, "evaluate", collapsed)
    one, other = compare(protocol, ["rtn-2", "rtn-4"], tmp_path, isolate=False)["rows"]
    assert one["perplexity"] == {"builtin": float("inf")}
    assert other["perplexity"]["builtin"] < 1000
    assert json.loads((tmp_path / RESULTS).read_text())["rows"][0]["perplexity"] == {"builtin": None}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": "nofile.txt"}, "nofile.txt"),
        ({"window_length": 4096}, "choose --window-length 128 or less"),
        ({"windows": 0}, "at least one window"),
        ({"distill_windows": -3}, "at least one window"),
        ({"windows": 10**6}, "its .* tokens hold"),
        ({"device": "tpu"}, "device 'tpu' is not known"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
    ],
    ids=str,
)
def test_what_cannot_calibrate_is_refused_before_any_work(protocol, tmp_path, change, said):
    other = replace(protocol, calibration=replace(protocol.calibration, **change))
    with pytest.raises(ArbllmError, match=said):
        compare(other, ["fp16", "arb-rc"], tmp_path / "out", isolate=False)
    assert not (tmp_path / "out").exists()


def test_options_of_tasks_without_any_are_refused(protocol, tmp_path):
    with pytest.raises(ConfigError, match="limit and task_data are for tasks"):
        compare(replace(protocol, limit=3), ["fp16"], tmp_path / "out", isolate=False)


def test_damaged_files_are_named(protocol, tmp_path):
    (tmp_path / ROWS).mkdir()
    (tmp_path / ROWS / "fp16.json").write_text('{"quant')
    with pytest.raises(ConfigError, match=r"fp16\.json: not readable .*; delete it"):
        compare(protocol, ["fp16"], tmp_path, isolate=False)
    (tmp_path / "settings.json").write_text("")
    with pytest.raises(ConfigError, match=r"settings\.json: not readable .*; choose another --out"):
        compare(protocol, ["fp16"], tmp_path, isolate=False)


def test_tasks_are_kept_one_by_one(protocol, tmp_path):
    task = {"task": "piqa", "items": 4, "acc": 0.5, "acc_stderr": 0.25}
    asked = replace(protocol, tasks=("piqa",), limit=4)
    pieces = text_pieces(asked)
    [row] = compare(protocol, ["fp16"], tmp_path, isolate=False)["rows"]
    assert row["average_acc"] is None
    assert collect(asked, pieces, tmp_path, ["fp16"])["rows"] == []
    file = tmp_path / ROWS / "fp16.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tasks": {"piqa": {"4": task}}}))
    [row] = collect(asked, pieces, tmp_path, ["fp16"])["rows"]
    assert (row["tasks"], row["average_acc"], row["average_acc_norm"]) == ([task], 0.5, 0.5)
    assert collect(replace(asked, limit=5), pieces, tmp_path, ["fp16"])["rows"] == []


def test_rows_of_ablations_are_left_out(protocol, finished):
    out, results = finished
    row = out / ROWS / "fp16.json"
    stranger = row.with_name("arb-rc-cgb-g4.json")
    stranger.write_text(row.read_text())
    try:
        found = collect(protocol, text_pieces(protocol), out, METHODS)["rows"]
    finally:
        stranger.unlink()
    assert [each["method"] for each in found] == [each["method"] for each in results["rows"]]


def test_other_settings_are_refused(protocol, finished):
    with pytest.raises(ConfigError, match=r"context was 64, not 32"):
        compare(replace(protocol, context=32), ["fp16"], finished[0], isolate=False)
    with pytest.raises(ConfigError, match=r"settings \(windows was 4, not 5\)"):
        compare(replace(protocol, calibration=replace(protocol.calibration, windows=5)), ["fp16"], finished[0])
    with pytest.raises(ConfigError, match="have one name; rename"):
        compare(replace(protocol, texts=("elsewhere/builtin",)), ["fp16"], finished[0], isolate=False)
    with pytest.raises(TextError, match="max-windows must be at least 1, not 0"):
        compare(replace(protocol, max_windows=0), ["fp16"], finished[0], isolate=False)


def test_what_distils_may_change_until_something_was_distilled(protocol, tmp_path):
    (tmp_path / ROWS).mkdir()
    (tmp_path / ROWS / "fp16.json").write_text("{}")
    (tmp_path / "settings.json").write_text(json.dumps(merged_settings(protocol, tmp_path / "none")))
    other = replace(protocol, calibration=replace(protocol.calibration, distill_windows=7))
    assert merged_settings(other, tmp_path)["calibration"]["distill_windows"] == 7
    (tmp_path / ROWS / "arb-rcx-2-distilled.json").write_text("{}")
    with pytest.raises(ConfigError, match="distill_windows was None, not 7"):
        merged_settings(other, tmp_path)


def test_a_step_in_a_process_of_its_own():
    assert isolated(dict, [("a", 1)]) == {"a": 1}


def test_a_step_that_is_killed_tells_of_memory():
    with pytest.raises(ArbllmError, match="ended from outside, probably for lack of memory"):
        isolated(os._exit, 9)


def test_a_step_ends_when_its_job_is_stopped(tmp_path):
    begun = tmp_path / "begun"

    def stop():
        while not begun.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop).start()
    start = time.perf_counter()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            isolated(exec, f"open({str(begun)!r}, 'w').close(); import time; time.sleep(600)")
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.perf_counter() - start < 300


def test_a_step_ends_when_its_job_is_killed(tmp_path):
    """A process that is killed has no time to say so."""
    begun = tmp_path / "begun"
    step = f"import os, time; open({str(begun)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    lines = [
        "from arbllm.evaluation.steps import isolated",
        "if __name__ == '__main__':",
        f"    isolated(exec, {step!r})",
    ]
    (tmp_path / "job.py").write_text("\n".join(lines))
    with subprocess.Popen([sys.executable, str(tmp_path / "job.py")]) as process:
        wait_until(lambda: begun.exists() and begun.read_text())
        process.kill()
    wait_until(lambda: not is_running(int(begun.read_text())))


def wait_until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"  # nobody may have reaped it


def test_a_library_that_is_missing_is_told_before_any_work(protocol, tmp_path, monkeypatch):
    monkeypatch.setattr("arbllm.evaluation.peers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="method hqq-4 needs the library hqq: pip install hqq"):
        compare(protocol, ["fp16", "gptq-4", "hqq-4"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_method_is_an_error_that_leaves_nothing(protocol, tmp_path):
    with pytest.raises(ConfigError, match="no method is named"):
        compare(protocol, [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"context": 0}, "a context of 0 tokens"), ({"context": 10**6}, "the model takes at most 128 tokens")],
)
def test_windows_are_counted_before_any_work(protocol, tmp_path, changes, message):
    with pytest.raises(ArbllmError, match=message):
        compare(replace(protocol, **changes), ["rtn-4"], tmp_path / "out", isolate=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "family", "bits", "tune", "distill"),
    [
        ("arb-rcx", "arb-rcx", 2.25, None, 0),
        ("arb-rcx-1.6", "arb-rcx", 1.6, None, 0),
        ("arb-rcx-2.85-untuned", "arb-rcx", 2.85, 0, 0),
        ("arb-rcx-2-distilled", "arb-rcx", 2.0, None, DISTILLATION_STEPS),
        ("arb-x", "arb-x", None, None, 0),
    ],
)
def test_names_of_binarizations(name, family, bits, tune, distill):
    recipe = find_recipe(name)
    assert (recipe.family, recipe.config.bits, recipe.tune, recipe.distill) == (family, bits, tune, distill)


def test_names_of_others():
    assert [find_recipe(name).family for name in ("fp16", "gptq-act-order-3", "hqq-1")] == [
        "fp16",
        "gptq-act-order",
        "hqq",
    ]
    for name in ("arb-rcx-x", "arb-rcx-2-3", "gptq-1", "arb-y", ""):
        with pytest.raises(ConfigError, match="arb-rcx"):
            find_recipe(name)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_hqq_counts_float16_scales_and_zeros(bits):
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
    rounded = hqq_round(weight, bits)
    assert rounded.true_bits == bits + 32 / 64
    assert all(len(set(group.tolist())) <= 2**bits for group in rounded.weight.reshape(-1, 64))
    if bits > 1:  # with two levels its zero does not converge
        assert output_error(weight, rounded.weight, torch.eye(128)) < {2: 0.2, 4: 0.01}[bits]
    round_linear, found = find_peer(f"hqq-{bits}")
    assert torch.equal(round_linear(weight, factorize(torch.eye(128))).weight, rounded.weight)
    assert found == bits
