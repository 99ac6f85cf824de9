import importlib
import random
import sys

import pytest


@pytest.fixture(scope="module")
def fuzz(pytestconfig):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
        yield importlib.import_module("fuzz")
        sys.modules.pop("fuzz", None)


@pytest.fixture(scope="module")
def checkpoints(fuzz, tmp_path_factory):
    return fuzz.make_checkpoints(tmp_path_factory.mktemp("fuzz"))


def test_damaged_copies_are_read_as_written_or_refused_by_name(fuzz, checkpoints):
    outcome = fuzz.fuzz(checkpoints, fuzz.contents, 2000)
    assert outcome.cases == 2000
    assert outcome.refused.keys() == {*fuzz.DAMAGES, fuzz.FORGED}
    assert outcome.refused.total() > 1500
    assert outcome.slowest < 5
    assert outcome.memory < 200e6


def test_damaged_copies_load_as_written_or_are_refused_by_name(fuzz, checkpoints):
    outcome = fuzz.fuzz(checkpoints, fuzz.loaded, 2000)
    assert outcome.refused.keys() == {*fuzz.DAMAGES, fuzz.FORGED}
    assert outcome.refused.total() > 1500
    assert outcome.slowest < 5
    assert outcome.memory < 300e6


def test_the_judge_sees_a_wrong_reader(fuzz, checkpoints):
    """A reader that believes its files is caught: without checksums, a flipped byte changes what is read."""

    def credulous(path):
        file = next(path.glob("*.safetensors"))
        return {"tensors": file.read_bytes()[-200:]}

    with pytest.raises(AssertionError, match="was read as something else"):
        fuzz.fuzz(checkpoints, credulous, 200)


def test_every_damage_changes_something(fuzz, checkpoints):
    chance = random.Random(0)
    file = next(checkpoints[0].glob("*.safetensors"))
    for damage in (fuzz.damage_byte, fuzz.damage_length, fuzz.damage_header):
        octets = bytearray(file.read_bytes())
        before = bytes(octets)
        damage(octets, chance)
        assert bytes(octets) != before
