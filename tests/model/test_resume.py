import json
import os
import shutil
import warnings
from typing import IO

import pytest
import torch

import arbllm
from arbllm.errors import ArbllmError
from arbllm.format import output
from arbllm.format.output import write_whole
from arbllm.measure import Measurement
from arbllm.model import resume
from arbllm.model.events import BlockFinished, BlockStarted, Event
from arbllm.model.resume import FinishedBlock, Progress, resumable_output, unfinished_directory
from tests.helpers import random_matrix
from tests.tiny import save_tiny

OPTIONS = {"calibration": "builtin", "windows": 3, "window_length": 32, "device": "cpu"}
JOB = OPTIONS | {"tune": 2, "distill": 2, "config": arbllm.BinarizationConfig(iterations=1)}
MANIFEST = {"model": "abc", "options": {"bits": 2.25, "seed": 0}}
BLOCK = FinishedBlock(
    {"blocks.3.proj": random_matrix(8, 40, salient=5, block_size=16)},
    {"norm.weight": torch.arange(4.0) / 3},
    (BlockStarted(3, 5), BlockFinished(3, 5, 0.1, 0.2, 0.3, 0.4, 0.5, 6)),
)


class StoppedError(BaseException):
    """As if the process ended."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def stop(monkeypatch):
    """Stops the job before a file of this name is written."""

    def at(name):
        write = output.write_whole

        def write_or_stop(file, octets):
            if file.name.startswith(name):
                raise StoppedError
            write(file, octets)

        monkeypatch.setattr(output, "write_whole", write_or_stop)

    return at


class Known:
    """A meter that shows what it is told."""

    def __init__(self, seconds, peak):
        self.measurement = Measurement(seconds, peak)

    def read(self):
        return self.measurement


def test_what_a_job_cost_before_it_was_stopped_counts(tmp_path):
    assert Progress(tmp_path, MANIFEST, meter=Known(1.0, 999)).cost() == Measurement(1.0, 999)
    Progress(tmp_path, MANIFEST, meter=Known(5.0, 100)).keep_shares({})
    again = Progress(tmp_path, MANIFEST, meter=Known(2.0, 70))
    assert again.cost() == Measurement(7.0, 100)
    again.keep_block(3, BLOCK)
    assert Progress(tmp_path, MANIFEST, meter=Known(1.0, 120)).cost() == Measurement(8.0, 120)
    other = MANIFEST | {"model": "abd"}
    assert Progress(tmp_path, other, overwrite=True, meter=Known(1.0, 2)).cost() == Measurement(1.0, 2)


def test_a_block_comes_back_as_it_was(tmp_path):
    Progress(tmp_path, MANIFEST).keep_block(3, BLOCK)
    progress = Progress(tmp_path, MANIFEST)
    found = progress.block(3)
    assert found.events == BLOCK.events
    assert torch.equal(found.others["norm.weight"], BLOCK.others["norm.weight"])
    matrix, kept = found.matrices["blocks.3.proj"], BLOCK.matrices["blocks.3.proj"]
    assert matrix.layout == kept.layout
    assert all(torch.equal(matrix.tensors()[name], tensor) for name, tensor in kept.tensors().items())
    assert progress.block(2) is None


def test_shares_come_back_exactly(tmp_path):
    shares = {"a": 2 / 3, "b": 1.1 + 2.2}
    Progress(tmp_path, MANIFEST).keep_shares(shares)
    assert Progress(tmp_path, MANIFEST).shares() == shares


def test_no_flipped_byte_is_believed(tmp_path):
    progress = Progress(tmp_path, MANIFEST)
    progress.keep_block(0, BLOCK)
    file = tmp_path / "block-00000.safetensors"
    sound = file.read_bytes()
    for offset in range(0, len(sound), 41):
        file.write_bytes(sound[:offset] + bytes([sound[offset] ^ 4]) + sound[offset + 1 :])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = progress.block(0)
        assert (found is None) == bool(caught)
        assert found is None or found.events == BLOCK.events  # the flipped byte was padding
    file.write_bytes(sound[:-1])
    with pytest.warns(UserWarning, match=r"block-00000\.safetensors is damaged"):
        assert progress.block(0) is None


def test_another_job_is_refused_with_the_differences(tmp_path):
    Progress(tmp_path, MANIFEST)
    other = {"model": "abd", "options": {"bits": 2.5, "seed": 0}}
    with pytest.raises(ArbllmError, match=r"bits 2\.25 then, 2\.5 now, model 'abc' then, 'abd' now.*--overwrite"):
        Progress(tmp_path, other)


def test_a_block_of_another_job_is_not_taken(tmp_path):
    Progress(tmp_path, MANIFEST).keep_block(0, BLOCK)
    (tmp_path / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="of another job"):
        assert Progress(tmp_path, MANIFEST | {"model": "abd"}).block(0) is None


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    write_whole(tmp_path / "a", b"first")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"):
        write_whole(tmp_path / "a", b"second")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"first"


def test_two_jobs_do_not_write_to_one_directory(tmp_path):
    with (
        resumable_output(tmp_path / "out"),
        pytest.raises(ArbllmError, match="another job is writing"),
        resumable_output(tmp_path / "out"),
    ):
        pass


@pytest.mark.filterwarnings("ignore:what is finished is kept")
@pytest.mark.parametrize("name", ["block-00000", "block-00001", "training", "distilled"])
def test_a_stopped_job_goes_on(dense, tmp_path, stop, monkeypatch, name):
    arbllm.quantize(dense, tmp_path / "whole", **JOB)
    monkeypatch.setattr("arbllm.model.training.KEEP_SECONDS", 0)
    stop(name)
    with pytest.raises(StoppedError):
        arbllm.quantize(dense, tmp_path / "out", **JOB)
    monkeypatch.undo()
    solved: list[Event] = []
    arbllm.quantize(dense, tmp_path / "out", **JOB, on_event=solved.append)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    kinds = [event.event for event in solved]
    assert (kinds.count("linear_quantized"), kinds.count("block_finished")) == (14, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.filterwarnings("ignore:what is finished is kept")
def test_changed_options_are_refused_and_overwrite_starts_again(dense, tmp_path, stop, monkeypatch):
    stop("block-00001")
    with pytest.raises(StoppedError):
        arbllm.quantize(dense, tmp_path / "out", **JOB)
    monkeypatch.undo()
    with pytest.raises(ArbllmError, match="windows 3 then, 4 now"):
        arbllm.quantize(dense, tmp_path / "out", **{**JOB, "windows": 4})
    kept = tmp_path / ".out.unfinished"
    assert (kept / "block-00000.safetensors").exists()
    assert json.loads((kept / "manifest.json").read_text())["options"]["windows"] == 3
    arbllm.quantize(dense, tmp_path / "out", **{**JOB, "windows": 4}, overwrite=True)
    assert not kept.exists()


@pytest.mark.filterwarnings("ignore:what is finished is kept")
def test_other_text_to_distil_on_is_another_job(dense, tmp_path, stop, monkeypatch):
    text = tmp_path / "text.txt"
    options = {**JOB, "calibration": str(text), "windows": 1, "window_length": 32, "distill_windows": 9}
    text.write_text("a" * 32 * 9)
    stop("distilled")
    with pytest.raises(StoppedError):
        arbllm.quantize(dense, tmp_path / "out", **options)
    monkeypatch.undo()
    for changed in ("b" + "a" * (32 * 9 - 1), "a" * (32 * 9 - 1) + "b"):  # only one of them is calibrated on, if any
        text.write_text(changed)
        with pytest.raises(ArbllmError, match="distillation_tokens"):
            arbllm.quantize(dense, tmp_path / "out", **options)


@pytest.mark.filterwarnings("ignore:what is finished is kept")
def test_a_job_that_replaces_a_checkpoint_goes_on_too(dense, tmp_path, stop, monkeypatch):
    arbllm.quantize(dense, tmp_path / "out", **{**JOB, "windows": 4})
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    stop("block-00001")
    with pytest.raises(StoppedError):
        arbllm.quantize(dense, tmp_path / "out", **JOB, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    kept = tmp_path / ".out.unfinished" / "block-00000.safetensors"
    written = kept.stat().st_mtime_ns
    found = []
    arbllm.quantize(
        dense, tmp_path / "out", **JOB, overwrite=True, on_event=lambda _: found.append(kept.stat().st_mtime_ns)
    )
    assert set(found) == {written}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before


def test_a_lock_on_a_file_that_is_gone_is_no_lock(tmp_path, monkeypatch):
    """A job ends, and removes its directory, just as another has opened the lock there."""
    directory, lock = unfinished_directory(tmp_path / "out"), resume._lock
    opened: list[IO[str]] = []

    def late(file, out):
        if not opened:
            shutil.rmtree(directory)
        opened.append(file)
        lock(file, out)

    monkeypatch.setattr(resume, "_lock", late)
    with resumable_output(tmp_path / "out") as (kept, _):
        assert [file.closed for file in opened] == [True, False]
        assert kept == directory
        monkeypatch.undo()
        with pytest.raises(ArbllmError, match="another job is writing"), resumable_output(tmp_path / "out"):
            pytest.fail("two jobs at once")
