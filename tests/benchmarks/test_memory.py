import re
import subprocess
import sys

import pytest

from tests.helpers import pack_randomly
from tests.tiny import tiny_llama


def test_a_streamed_job_takes_about_what_is_foretold(pytestconfig, tmp_path):
    """Of a tiny model: the program itself, and no more than a little beside it."""
    benchmarks = pytestconfig.rootpath / "benchmarks"
    model = tmp_path / "dense"
    text = ["--windows", "3", "--window-length", "64"]
    for command in (
        [benchmarks / "make_random_model.py", model, "--shape", "tiny"],
        [benchmarks / "memory.py", "stream", model, "--blocks", "2", *text],
    ):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["block 0", "block 1", "dense"]
    assert "the first 2 of 4 blocks" in done.stdout
    taken, foretold = map(float, re.findall(r"(?:took|says) ([0-9.]+) GB", done.stdout))
    assert 0.8 < foretold / taken < 1.25
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which memory is a file's")
def test_packed_tensors_of_a_model_that_runs_are_left_to_the_file(pytestconfig, tmp_path):
    pack_randomly(tiny_llama(1, hidden_size=1024, intermediate_size=4096)).save_pretrained(tmp_path / "packed")
    command = [sys.executable, pytestconfig.rootpath / "benchmarks" / "memory.py", "run", tmp_path / "packed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (packed,) = map(float, re.findall(r"packed linears ([0-9.]+) MB", done.stdout))
    loaded, ran = map(float, re.findall(r"([0-9.]+) MB of files", done.stdout))
    assert 0.7 * packed < loaded - ran < 1.2 * packed
