import json

import pytest
import torch
from transformers import AutoTokenizer

import arbllm
from arbllm.errors import ConfigError, ModelError
from arbllm.format.checkpoint import bytes_on_disk, open_checkpoint, verify
from arbllm.model.events import DistillationFinished, Event
from arbllm.model.training import Trainer
from arbllm.nn import BinaryLinear
from tests.tiny import byte_tokenizer, save_tiny, save_tiny_mixture, tiny_llama

OPTIONS = {"calibration": "builtin", "windows": 8, "window_length": 64, "device": "cpu"}
STEPS = 8


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    # Weights larger than at the start of training: otherwise the model says next to nothing, whatever its scales are.
    return save_tiny(tmp_path_factory.mktemp("dense"), initializer_range=0.3)


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "packed"
    arbllm.quantize(dense, out, **OPTIONS, tune=2, bitmap="entropy", embedding_bits=8)
    return out


@pytest.fixture(scope="module")
def distilled(dense, packed):
    """(summary, events) of a distillation that took its text from the checkpoint."""
    events: list[Event] = []
    out = packed.parent / "distilled"
    return arbllm.distill(packed, out, model=dense, steps=STEPS, device="cpu", on_event=events.append), events


def matrices(path):
    modules = arbllm.load(path).named_modules()
    return {name: module.matrix for name, module in modules if isinstance(module, BinaryLinear)}


def test_scales_alone_change_and_the_rest_is_as_it_was(packed, distilled):
    summary, _ = distilled
    verify(summary.path)
    before, after = open_checkpoint(packed), open_checkpoint(summary.path)
    assert (before.layouts, before.bitmap, before.embeddings) == (after.layouts, after.bitmap, after.embeddings)
    old, new = matrices(packed), matrices(summary.path)
    assert all(torch.equal(new[name].signs, matrix.signs) for name, matrix in old.items())
    assert any(not torch.equal(new[name].scales()[0], matrix.scales()[0]) for name, matrix in old.items())
    assert AutoTokenizer.from_pretrained(summary.path)("a")["input_ids"]


def test_it_tells_what_distillation_did(packed, distilled):
    summary, events = distilled
    finished = events[-1]
    assert isinstance(finished, DistillationFinished)
    told = (summary.divergence_before, summary.divergence_after, summary.steps)
    assert told == (finished.before, finished.after, finished.steps)
    assert summary.divergence_after < summary.divergence_before
    names = ("quantization_log.jsonl", "distillation_log.jsonl")
    before, now = (len((summary.path / name).read_text().splitlines()) for name in names)
    assert (before, now) == (len((packed / names[0]).read_text().splitlines()), len(events))


def test_the_checkpoint_and_its_card_tell_of_all_steps(dense, distilled, tmp_path):
    calibration = {"text": "builtin", "windows": 8, "window_length": 64, "seed": 0, "tune": 2}
    first = distilled[0].path
    assert open_checkpoint(first).quantization["calibration"] == calibration | {"distill": STEPS}
    assert f"| tuning | 2 steps a block, {STEPS} of distillation |" in (first / "README.md").read_text()
    text = tmp_path / "text.txt"
    text.write_text("other words " * 100)
    arbllm.distill(first, tmp_path / "more", model=dense, steps=1, calibration=str(text), device="cpu")
    other = {"text": "text.txt", "windows": 8, "window_length": 64, "seed": 0}
    wanted = calibration | {"distill": STEPS + 1, "distillation": other}
    assert open_checkpoint(tmp_path / "more").quantization["calibration"] == wanted
    card = (tmp_path / "more" / "README.md").read_text()
    assert f"{STEPS + 1} of distillation on 8 windows of 64 tokens of text.txt, seed 0 |" in card


def test_it_is_what_quantize_does_in_the_end(dense, packed, distilled, tmp_path):
    options = OPTIONS | {"tune": 2, "bitmap": "entropy", "embedding_bits": 8}
    arbllm.quantize(dense, tmp_path / "at once", **options, distill=STEPS)
    for name, matrix in matrices(tmp_path / "at once").items():
        other = matrices(distilled[0].path)[name]
        assert all(torch.equal(one, two) for one, two in zip(matrix.scales(), other.scales(), strict=True))


def test_quantize_distils_on_more_text_than_it_calibrates_on(dense, packed, tmp_path):
    options = OPTIONS | {"tune": 2, "bitmap": "entropy", "embedding_bits": 8}
    more = 11
    arbllm.quantize(dense, tmp_path / "at once", **options, distill=1, distill_windows=more)
    arbllm.distill(packed, tmp_path / "later", model=dense, steps=1, windows=more, device="cpu")
    found, wanted = (open_checkpoint(tmp_path / name) for name in ("at once", "later"))
    assert found.quantization["calibration"] == wanted.quantization["calibration"]
    assert found.quantization["calibration"]["distillation"]["windows"] == more
    for name, matrix in matrices(tmp_path / "at once").items():
        other = matrices(tmp_path / "later")[name]
        assert all(torch.equal(one, two) for one, two in zip(matrix.scales(), other.scales(), strict=True))
    with pytest.raises(arbllm.ArbllmError, match="at least one window"):
        arbllm.quantize(dense, tmp_path / "none", **options, distill=1, distill_windows=0)
    assert not (tmp_path / "none").exists()


def test_a_mixture(tmp_path):
    dense = save_tiny_mixture(tmp_path / "dense")
    arbllm.quantize(dense, tmp_path / "packed", tune=0, **OPTIONS)
    made = arbllm.distill(tmp_path / "packed", tmp_path / "distilled", model=dense, steps=STEPS, device="cpu")
    verify(made.path)
    assert made.divergence_after <= made.divergence_before


def test_a_half_precision_model_stays_one(tmp_path):
    model = tiny_llama(initializer_range=0.3).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    arbllm.quantize(tmp_path / "dense", tmp_path / "packed", **OPTIONS, tune=0)
    summary = arbllm.distill(tmp_path / "packed", tmp_path / "out", model=tmp_path / "dense", steps=2, device="cpu")
    old, new = arbllm.load(tmp_path / "packed"), arbllm.load(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in old.state_dict().items()} == {
        name: tensor.dtype for name, tensor in new.state_dict().items()
    }
    assert summary.bytes_on_disk == pytest.approx(bytes_on_disk(tmp_path / "packed"), abs=1000)


@pytest.mark.filterwarnings("ignore:what is finished is kept")
@pytest.mark.parametrize("stopped", [1, 5, 7])
def test_a_stopped_distillation_goes_on(dense, packed, distilled, tmp_path, monkeypatch, stopped):
    monkeypatch.setattr("arbllm.model.training.KEEP_SECONDS", 0)
    taken: list[int] = []
    step = Trainer.step

    def step_or_stop(trainer: Trainer, number: int, loss: torch.Tensor) -> None:
        if len(taken) == stopped:
            raise KeyboardInterrupt
        taken.append(number)
        step(trainer, number, loss)

    options = {"model": dense, "steps": STEPS, "device": "cpu"}
    monkeypatch.setattr(Trainer, "step", step_or_stop)
    with pytest.raises(KeyboardInterrupt):
        arbllm.distill(packed, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == [".out.unfinished"]
    with pytest.raises(arbllm.ArbllmError, match="steps 8 then, 9 now"):
        arbllm.distill(packed, tmp_path / "out", **options | {"steps": 9})
    stopped = 99
    events: list[Event] = []
    arbllm.distill(packed, tmp_path / "out", **options, on_event=events.append)
    assert taken == list(range(STEPS))
    whole, wanted = distilled
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (whole.path / name).read_bytes()
    assert events[:-1] == wanted[:-1]  # the last one tells the time, too
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ConfigError, "steps must be at least 1, not 0"),
        ({"model": "narrow"}, ModelError, r"no linear model.layers.0.* as .*packed has; give the model that"),
        ({"model": "packed"}, ModelError, "no linear model.layers.0.* dense weights"),
        ({"model": "verbose"}, ModelError, "has 300 tokens"),
        ({"model": "other"}, ModelError, r"embeddings of .*other are not those of .*; give the model that"),
        ({"windows": 10**6}, arbllm.TextError, "windows"),
        ({"window_length": 4096}, ModelError, "longer than the model's 128 positions"),
    ],
)
def test_what_cannot_be_done_leaves_nothing_behind(dense, packed, tmp_path, changes, error, message):
    save_tiny(tmp_path / "narrow", intermediate_size=32)
    save_tiny(tmp_path / "verbose", vocab_size=300)
    save_tiny(tmp_path / "other", initializer_range=0.03)
    models = {name: tmp_path / name for name in ("narrow", "verbose", "other")} | {"packed": packed}
    options = {"steps": 1, "device": "cpu"} | changes
    options["model"] = models.get(str(changes.get("model")), dense)
    with pytest.raises(error, match=message):
        arbllm.distill(packed, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["narrow", "other", "verbose"]


def test_a_checkpoint_that_cannot_be_distilled(dense, packed, tmp_path):
    for read in (packed, dense):
        with pytest.raises(ConfigError, match="is itself what is read"):
            arbllm.distill(packed, read, model=dense, overwrite=True)
    arbllm.quantize(dense, tmp_path / "arb", **OPTIONS, config=arbllm.BinarizationConfig(method="arb", iterations=1))
    with pytest.raises(ConfigError, match="distill is for arb-rc and arb-rcx"):
        arbllm.distill(tmp_path / "arb", tmp_path / "out", model=dense)


def test_a_file_must_be_named_again(dense, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("word " * 200)
    options = OPTIONS | {"calibration": str(text), "tune": 0}
    arbllm.quantize(dense, tmp_path / "packed", **options, config=arbllm.BinarizationConfig(iterations=0))
    with pytest.raises(ConfigError, match=r"a file, text\.txt; give its path as calibration"):
        arbllm.distill(tmp_path / "packed", tmp_path / "out", model=dense)
    arbllm.distill(tmp_path / "packed", tmp_path / "out", model=dense, steps=1, calibration=str(text), device="cpu")
    calibration = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["calibration"]
    assert calibration["distill"] == 1
    assert "distillation" not in calibration
