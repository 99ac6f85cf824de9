"""What the disk, the files and the memory can do to a job: one line that says so, and nothing lost or half-written."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

import arbllm
from arbllm.errors import ArbllmError, ModelError
from arbllm.model import quantize
from tests.tiny import byte_tokenizer, save_tiny, tiny_llama

JOB = {
    "config": arbllm.BinarizationConfig(iterations=1, allocation="uniform"),
    "calibration": "builtin",
    "windows": 3,
    "window_length": 32,
    "device": "cpu",
    "tune": 0,
}
KEPT = ["block-00000.safetensors", "cost.json", "lock", "manifest.json"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"), layers=3)


@pytest.fixture(scope="module")
def whole(dense, tmp_path_factory):
    """What an undisturbed job makes."""
    out = tmp_path_factory.mktemp("whole") / "packed"
    arbllm.quantize(dense, out, **JOB)
    return (out / "model.safetensors").read_bytes()


@pytest.fixture
def fails_then_goes_on(dense, whole, tmp_path, monkeypatch):
    """Runs a job that is to fail with some error, checks what it leaves, and runs it again undisturbed."""

    def check(message, kept=KEPT):
        out = tmp_path / "packed"
        with pytest.warns(UserWarning, match="the same command goes on"), pytest.raises(ArbllmError, match=message):
            arbllm.quantize(dense, out, **JOB)
        assert [path.name for path in tmp_path.iterdir()] == [".packed.unfinished"]
        assert sorted(path.name for path in (tmp_path / ".packed.unfinished").iterdir()) == kept
        monkeypatch.undo()
        arbllm.quantize(dense, out, **JOB)
        assert (out / "model.safetensors").read_bytes() == whole
        assert [path.name for path in tmp_path.iterdir()] == ["packed"]

    return check


def raises(error):
    def fail(*_, **__):
        raise error

    return fail


def sync_until(monkeypatch, error):
    """The disk fails when the second block is written."""
    sync = os.fsync

    def sync_or_fail(descriptor):
        if "block-00001" in Path(f"/proc/self/fd/{descriptor}").readlink().name:
            raise error
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_or_fail)


def test_a_disk_that_fills_up(monkeypatch, fails_then_goes_on):
    sync_until(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    fails_then_goes_on("packed: no space left on the disk; free some, or choose an output directory on another disk")


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_in_the_end(monkeypatch, fails_then_goes_on, error):
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", raises(error))
    blocks = [f"block-0000{index}.safetensors" for index in range(3)]
    fails_then_goes_on("packed: no space left on the disk", [*blocks, "cost.json", "lock", "manifest.json"])


def test_a_disk_that_becomes_read_only(monkeypatch, fails_then_goes_on):
    sync_until(monkeypatch, OSError(errno.EROFS, "Read-only file system"))
    fails_then_goes_on(r"cannot be written \(Read-only file system: .*/block-00001.*choose another output directory")


def test_a_read_only_directory(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", raises(OSError(errno.EROFS, "Read-only file system")))
    with pytest.raises(ArbllmError, match=r"packed: cannot be made \(Read-only file system\); choose another output"):
        arbllm.quantize(dense, tmp_path / "packed", **JOB)
    assert list(tmp_path.iterdir()) == []


def test_a_device_out_of_memory(monkeypatch, fails_then_goes_on):
    solve = quantize._BlockJob._solve

    def solve_or_fail(job, groups):
        if job.block.index == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return solve(job, groups)

    monkeypatch.setattr(quantize._BlockJob, "_solve", solve_or_fail)
    fails_then_goes_on(r"the device is out of memory; use fewer or shorter windows \(--windows, --window-length\)")


def test_other_errors_of_the_device_stay_what_they_are(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize._BlockJob, "_solve", raises(RuntimeError("an illegal memory access")))
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        arbllm.quantize(dense, tmp_path / "packed", **JOB)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def shards(tmp_path):
    """A tiny model in several files."""
    tiny_llama().save_pretrained(tmp_path / "dense", max_shard_size="50KB")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    return sorted((tmp_path / "dense").glob("model-*.safetensors"))


def refused(shard, message, stream):
    with pytest.raises(ModelError, match=rf"{shard.name}.*{message}"):
        arbllm.quantize(shard.parent, shard.parent.parent / "packed", **JOB, stream=stream)
    assert [path.name for path in shard.parent.parent.iterdir()] == ["dense"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_shard_that_was_cut_off(shards, stream):
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    refused(shards[1], "cut off before the end of tensor .*: download or copy the checkpoint again", stream)


@pytest.mark.parametrize("stream", [False, True])
def test_a_shard_that_is_not_there(shards, stream):
    shards[1].unlink()
    refused(shards[1], "", stream)


def test_a_shard_that_may_not_be_read(shards, monkeypatch):
    """As the system would refuse it to anybody but root."""
    opened = Path.open

    def open_or_refuse(path, *arguments, **options):
        if path == shards[1]:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_or_refuse)
    refused(shards[1], r"cannot be read \(Permission denied\); check its permissions", stream=True)
