import errno
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from arbllm.errors import ArbllmError, ConfigError
from arbllm.format.output import output_directory, output_path, put_back


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_output_appears_whole(tmp_path):
    out = tmp_path / "new" / "out"
    with output_directory(out) as work:
        (work / "file").write_text("done")
        assert not out.exists()
        assert work.parent == out.parent
    assert (out / "file").read_text() == "done"
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_nothing_half_written_stays(tmp_path, error):
    def job():
        with output_directory(tmp_path / "out") as work:
            (work / "file").write_text("half")
            raise error

    with pytest.raises(type(error)):
        job()
    assert names(tmp_path) == []


def test_an_existing_directory_is_refused_before_any_work(tmp_path):
    (tmp_path / "kept").write_text("old")
    with pytest.raises(ArbllmError, match=r"exists and is not empty.*--overwrite"), output_directory(tmp_path):
        pytest.fail("work was begun")
    assert names(tmp_path) == ["kept"]


def test_an_empty_directory_is_taken(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with output_directory(out) as work:
        (work / "file").write_text("done")
    assert names(out) == ["file"]
    assert names(tmp_path) == ["out"]


def test_overwrite_replaces_in_the_end_only(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    with pytest.raises(ValueError, match="no"), output_directory(out, overwrite=True):
        raise ValueError("no")
    assert names(out) == ["config.json"]
    with output_directory(out, overwrite=True) as work:
        (work / "new").write_text("new")
        assert names(out) == ["config.json"]
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


def test_overwrite_does_not_replace_what_is_no_model(tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(ArbllmError, match="holds files, but no model"), output_directory(tmp_path, overwrite=True):
        pytest.fail("work was begun")
    assert names(tmp_path) == ["letters.txt"]


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ArbllmError, match=r"out: cannot be made \(Not a directory\)"),
        output_directory(tmp_path / "file" / "out"),
    ):
        pytest.fail("work was begun")


def test_a_file_is_no_output_directory(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ArbllmError, match="is a file"), output_directory(tmp_path / "out", overwrite=True):
        pytest.fail("work was begun")


@pytest.fixture(params=["python", "safetensors"])
def full_disk(request):
    if request.param == "python":
        return OSError(errno.ENOSPC, "No space left on device")
    return SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_full_disk_is_told(tmp_path, full_disk):
    with (
        pytest.raises(ArbllmError, match="out: no space left on the disk"),
        output_directory(tmp_path / "out"),
    ):
        raise full_disk
    assert names(tmp_path) == []


def test_what_made_way_for_a_killed_job_is_put_back(tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    work.mkdir()
    (tmp_path / "work.old").mkdir()
    (tmp_path / "work.old" / "config.json").write_text("old")
    put_back(out, work)
    assert (out / "config.json").read_text() == "old"
    (tmp_path / "work.old").mkdir()
    put_back(out, work)
    assert (tmp_path / "work.old").exists()


def test_what_is_read_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tmp_path / "models" / "dense"
    model.mkdir(parents=True)
    for out in (model, "~/models/dense", tmp_path / "models" / "." / "dense"):
        with pytest.raises(ConfigError, match="is itself what is read"):
            output_path(out, "some/hub-name", "~/models/dense")
    with pytest.raises(ConfigError, match=r"holds .*dense, what is read"):
        output_path("~/models", model)
    assert output_path("~/models/dense/packed", model) == model / "packed"


def test_an_old_directory_that_cannot_be_removed_is_left_and_named(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    remove = shutil.rmtree

    def refuse(path, *args, **options):
        if str(path).endswith(".old"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        remove(path, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.warns(UserWarning, match="held before is left in .*old"), output_directory(out, overwrite=True) as work:
        (work / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "new"
