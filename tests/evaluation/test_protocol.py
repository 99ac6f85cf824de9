import json
from dataclasses import replace

import pytest

from arbllm.errors import ConfigError
from arbllm.evaluation.compare import begin
from arbllm.evaluation.methods import Calibration
from arbllm.evaluation.protocol import ROWS, SETTINGS, Protocol, merged_settings
from arbllm.evaluation.tasks import definition
from tests.tiny import save_tiny


@pytest.fixture
def protocol(tmp_path):
    model = save_tiny(tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text("something to read " * 20)
    return Protocol(str(model), Calibration("builtin", 4, 64, 0, "cpu"), texts=(str(text),), context=64)


@pytest.fixture
def begun(protocol, tmp_path):
    """A directory with a row."""
    begin(replace(protocol, tasks=("piqa",), task_data="here"), tmp_path / "out")
    (tmp_path / "out" / ROWS / "fp16.json").write_text("{}")
    return tmp_path / "out"


def test_the_same_protocol_goes_on(protocol, begun):
    before = json.loads((begun / SETTINGS).read_text())
    assert begin(protocol, begun) == {protocol.texts[0]: [(0, 5)]}
    assert json.loads((begun / SETTINGS).read_text()) == before


def test_tasks_of_other_data_are_refused(protocol, begun):
    with pytest.raises(ConfigError, match=r"answers to tasks of here, not of the hub"):
        merged_settings(replace(protocol, tasks=("boolq",)), begun)


@pytest.mark.parametrize("name", ["model", "text"])
def test_other_files_under_the_same_path_are_refused(protocol, begun, tmp_path, name):
    if name == "model":
        save_tiny(tmp_path / "dense", intermediate_size=96)
    else:
        (tmp_path / "text.txt").write_text("something else to read " * 20)
    changed = protocol.model if name == "model" else protocol.texts[0]
    with pytest.raises(ConfigError, match=f"{changed} is not what it was when {begun} was begun"):
        begin(protocol, begun)


def test_other_questions_are_refused(protocol, tmp_path):
    questions = tmp_path / "qa" / definition("boolq", tmp_path)["dataset_kwargs"]["files"][0]
    questions.parent.mkdir(parents=True)
    questions.write_text("{}")
    asking = replace(protocol, tasks=("boolq",), task_data=str(tmp_path / "qa"))
    begin(asking, tmp_path / "other")
    (tmp_path / "other" / ROWS / "fp16.json").write_text("{}")
    begin(asking, tmp_path / "other")
    questions.write_text('{"question": "another"}')
    with pytest.raises(ConfigError, match="is not what it was"):
        begin(asking, tmp_path / "other")


def test_other_files_in_the_home_directory_are_refused(protocol, begun, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    at_home = replace(protocol, texts=("~/text.txt",), model="~/dense")
    begin(at_home, tmp_path / "other")
    (tmp_path / "other" / ROWS / "fp16.json").write_text("{}")
    (tmp_path / "text.txt").write_text("something else to read " * 20)
    with pytest.raises(ConfigError, match=r"~/text\.txt is not what it was"):
        begin(at_home, tmp_path / "other")


def test_settings_from_before_checksums_go_on(protocol, begun):
    settings = json.loads((begun / SETTINGS).read_text())
    del settings["contents"]
    (begun / SETTINGS).write_text(json.dumps(settings))
    begin(protocol, begun)
    assert "contents" in json.loads((begun / SETTINGS).read_text())


def test_without_a_row_anything_may_follow(protocol, tmp_path):
    begin(replace(protocol, model=str(save_tiny(tmp_path / "other"))), tmp_path / "out")
    begin(protocol, tmp_path / "out")
    assert merged_settings(protocol, tmp_path / "out")["model"] == protocol.model
