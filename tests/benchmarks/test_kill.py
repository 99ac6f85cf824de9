import subprocess
import sys


def test_ten_kills_change_nothing(pytestconfig):
    """In a process of its own, which has computed nothing before it forks."""
    script = pytestconfig.rootpath / "benchmarks" / "kill.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "10 kills; the checkpoint is the same, bit for bit; left over: nothing"
    kinds = [line.split(": ")[0].split(", ")[1] for line in lines[:-1]]
    assert (kinds.count("write"), kinds.count("moment"), kinds.count("rename")) == (3, 6, 1)
    assert any(".part" in line for line in lines)
