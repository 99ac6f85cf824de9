import json
import shutil
from collections import namedtuple

import pytest
import torch
from transformers import AutoModelForCausalLM

import arbllm
from arbllm.errors import ArbllmError, ConfigError, ModelError, TextError
from arbllm.export import export
from arbllm.format.checkpoint import bytes_on_disk, verify
from arbllm.format.report import report
from arbllm.model.events import BlockFinished, Event, JobStarted, LinearQuantized
from arbllm.model.training import Tuning
from arbllm.nn import BinaryLinear
from tests.tiny import bring_own_code, save_tiny

OPTIONS = {"calibration": "builtin", "windows": 4, "window_length": 64, "device": "cpu"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def job(dense, tmp_path_factory):
    """(summary, events) of a job that was evaluated, too."""
    events: list[Event] = []
    directory = tmp_path_factory.mktemp("out")
    text = directory / "held_out.txt"
    text.write_text("word " * 60)
    summary = arbllm.quantize(dense, directory / "packed", **OPTIONS, evaluate=str(text), on_event=events.append)
    return summary, events


def test_the_checkpoint_loads_and_computes_what_the_summary_says(job):
    summary, _ = job
    model = arbllm.load(summary.path)
    layers = [module for module in model.modules() if isinstance(module, BinaryLinear)]
    assert len(layers) == summary.linears == 14
    assert sum(layer.layout.weights for layer in layers) == summary.weights
    assert 8 * sum(layer.matrix.nbytes for layer in layers) / summary.weights == summary.true_bits_per_weight
    assert summary.bytes_on_disk == bytes_on_disk(summary.path)
    assert torch.isfinite(model(torch.arange(20)[None]).logits).all()


def test_sizes_before(job, dense):
    summary, _ = job
    assert summary.dense_linear_bytes == 4 * summary.weights
    assert summary.dense_bytes == pytest.approx(bytes_on_disk(dense), rel=0.05)  # the file has a header, too


def test_the_directory_has_all_that_users_need(job):
    summary, _ = job
    names = {path.name for path in summary.path.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "quantization_log.jsonl", "tokenizer.json"} <= names
    verify(summary.path)


def test_config_tells_how_it_was_made(job):
    config = json.loads((job[0].path / "config.json").read_text())["quantization_config"]
    assert config["binarization"] == arbllm.BinarizationConfig().to_dict()
    steps = {"tune": Tuning().steps, "distill": 0}
    assert config["calibration"] == {"text": "builtin", "windows": 4, "window_length": 64, "seed": 0, **steps}
    assert config["statistics"].keys() == config["linears"].keys()


def test_the_log_has_every_event(job):
    summary, events = job
    lines = [json.loads(line) for line in (summary.path / "quantization_log.jsonl").read_text().splitlines()]
    assert [{**line, "elapsed": 0} for line in lines] == [{**event.to_dict(), "elapsed": 0} for event in events]
    kinds = [type(event) for event in events]
    assert (kinds.count(JobStarted), kinds.count(BlockFinished), kinds.count(LinearQuantized)) == (1, 2, 14)


def test_the_card_has_the_measured_perplexity(job):
    summary, _ = job
    assert (
        f"| perplexity, held_out.txt | {summary.perplexity:.2f} at a context of 128 |"
        in (summary.path / "README.md").read_text()
    )


def test_the_model_behind_the_card_is_the_one_on_disk(job):
    summary, _ = job
    loaded = AutoModelForCausalLM.from_pretrained(summary.path)
    assert any(isinstance(module, BinaryLinear) for module in loaded.modules())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"calibration": "no such file"}, TextError, "no such file"),
        ({"windows": 10**6}, TextError, "windows"),
        ({"window_length": 129, "windows": 1}, ModelError, "128"),
        ({"dtype": "int3"}, ConfigError, "int3"),
        ({"bitmap": "zip"}, ConfigError, "raw, csr, entropy"),
        ({"bitmap": "csr", "size": 10**6}, ConfigError, "choose entropy"),
        (
            {"config": arbllm.BinarizationConfig("arb"), "size": 10**6},
            ConfigError,
            "size cannot be chosen with method 'arb'",
        ),
        (
            {"config": arbllm.BinarizationConfig(groups=4)},
            ConfigError,
            "groups is no option of method 'arb-rcx'; leave it out, or choose one of the paper's methods",
        ),
        (
            {"config": arbllm.BinarizationConfig("arb-rc", trellis=False)},
            ConfigError,
            "trellis is no option of method 'arb-rc'",
        ),
        (
            {"config": arbllm.BinarizationConfig(block_size=64)},
            ConfigError,
            "block_size is no option of method 'arb-rcx'",
        ),
        (
            {"config": arbllm.BinarizationConfig("billm", iterations=3)},
            ConfigError,
            "iterations is no option of method 'billm'",
        ),
        (
            {"config": arbllm.BinarizationConfig("arb-rc", partition="column", split_on="saliency")},
            ConfigError,
            "split_on is no option of partition 'column'; leave it out, or choose one with groups",
        ),
        ({"distill_windows": 4}, ConfigError, "distill_windows is of no use without distill"),
        ({"device": "cuda:99"}, ConfigError, "cuda:99"),
        ({"evaluate": "no such file"}, TextError, "no such file"),
    ],
)
def test_what_cannot_be_done_leaves_nothing_behind(dense, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        arbllm.quantize(dense, tmp_path / "packed", **{**OPTIONS, **changes})
    assert list(tmp_path.iterdir()) == []


def test_the_text_of_the_calibration_flatters_and_this_is_said(dense, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("word " * 200)
    with pytest.warns(UserWarning, match=r"text\.txt will flatter"), pytest.raises(ConfigError, match="int3"):
        arbllm.quantize(
            dense, tmp_path / "packed", **{**OPTIONS, "calibration": str(text), "evaluate": str(text), "dtype": "int3"}
        )


def test_models_that_bring_their_own_code(tmp_path):
    dense = bring_own_code(save_tiny(tmp_path / "dense"))
    packed = tmp_path / "packed"
    arbllm.quantize(dense, packed, **OPTIONS, evaluate="builtin", trust_remote_code=True)
    export(packed, tmp_path / "again", trust_remote_code=True)
    assert (tmp_path / "again" / "custom.py").exists()


def test_an_existing_directory_is_kept_unless_told_otherwise(dense, tmp_path):
    out = tmp_path / "packed"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "precious").write_text("kept")
    with pytest.raises(ArbllmError, match="--overwrite"):
        arbllm.quantize(dense, out, **OPTIONS)
    assert (out / "precious").read_text() == "kept"
    arbllm.quantize(dense, out, **OPTIONS, overwrite=True)
    assert not (out / "precious").exists()
    verify(out)


def test_the_model_is_not_its_own_output(dense):
    with pytest.raises(ConfigError, match="is itself what is read"):
        arbllm.quantize(dense, dense, **OPTIONS, overwrite=True)


def test_a_full_disk_is_noticed_before_the_work(dense, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    events: list[Event] = []
    with pytest.raises(ArbllmError, match="no space left"):
        arbllm.quantize(dense, tmp_path / "packed", **OPTIONS, on_event=events.append)
    assert events == []
    assert list(tmp_path.iterdir()) == []


def test_embeddings_in_8_bits(dense, job, tmp_path, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr("arbllm.pipeline.check_disk_space", lambda needed, _: asked.append(needed))
    summary = arbllm.quantize(dense, tmp_path / "packed", **OPTIONS, embedding_bits=8)
    found = report(summary.path)
    assert found.rounded_embeddings == ["lm_head", "model.embed_tokens"]
    assert found.size.embeddings == 2 * 257 * (32 + 2)
    assert summary.bytes_on_disk < job[0].bytes_on_disk - 40_000
    assert summary.dense_bytes == job[0].dense_bytes
    assert asked[0] + 32_000 > summary.bytes_on_disk
    assert "in 8 bits" in (summary.path / "README.md").read_text()


@pytest.mark.parametrize("bitmap", ["csr", "entropy"])
def test_coded_bitmaps(dense, tmp_path, monkeypatch, bitmap):
    grouped = arbllm.BinarizationConfig(trellis=False)
    uncoded = arbllm.quantize(dense, tmp_path / "uncoded", config=grouped, **OPTIONS)
    asked: list[int] = []
    monkeypatch.setattr("arbllm.pipeline.check_disk_space", lambda needed, _: asked.append(needed))
    summary = arbllm.quantize(dense, tmp_path / "packed", config=grouped, **OPTIONS, bitmap=bitmap)
    size = report(summary.path).size
    assert summary.true_bits_per_weight == size.linears.true_bits != size.linears_in_memory.true_bits
    assert summary.linear_bytes == size.linears.nbytes
    assert asked[0] + 32_000 > summary.bytes_on_disk
    raw, coded = arbllm.load(uncoded.path).state_dict(), arbllm.load(summary.path).state_dict()
    assert raw.keys() == coded.keys()
    assert all(torch.equal(coded[name], tensor) for name, tensor in raw.items())


@pytest.mark.parametrize(("method", "groups"), [("arb", 4), ("arb-rc", 2), ("arb-rc", 4)])
def test_the_room_asked_for_suffices(dense, tmp_path, monkeypatch, method, groups):
    asked: list[int] = []
    monkeypatch.setattr("arbllm.pipeline.check_disk_space", lambda needed, _: asked.append(needed))
    config = arbllm.BinarizationConfig(method=method, groups=groups, block_size=16)
    summary = arbllm.quantize(dense, tmp_path / "packed", config=config, **OPTIONS)
    headers = 32_000
    assert asked[0] + headers > summary.bytes_on_disk


def test_a_weight_that_is_not_a_number_is_named(tmp_path):
    save_tiny(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj"):
        arbllm.quantize(tmp_path / "dense", tmp_path / "packed", **OPTIONS)
    assert not (tmp_path / "packed").exists()
