"""Kills a quantization ten times, resumes it each time, and compares what it ends with, bit for bit.

python benchmarks/kill.py --kills 10

Six kills come at random moments, three in the middle of writing a file, one when the checkpoint is about to be put in
its place.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import arbllm
from arbllm.format import output
from arbllm.model import training
from arbllm.pipeline import quantize

MOMENTS = (0.1, 0.5)
"""When to kill, in units of the time of a job that is not: early, so that it takes many kills to come to the end."""
WRITTEN = ("model.safetensors", "config.json")
Job = Callable[[Path], None]


@dataclass
class Outcome:
    """What ten kills did.

    Attributes:
        moments: for each kill, what was kept at that moment.
        finished: blocks that were finished when the job was killed, each time.
        same: whether the checkpoint is that of an uninterrupted job.
        left_over: names that lie beside the checkpoints in the end.
    """

    moments: list[str] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    same: bool = False
    left_over: list[str] = field(default_factory=list)


def make_model(directory: Path, layers: int = 4) -> Path:
    """A small random model over the bytes, with its tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=257, num_hidden_layers=layers, max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory


def job(model: Path, out: Path) -> None:
    """All that a job can do: bits measured, blocks tuned, scales distilled, and kept after every step of that."""
    training.KEEP_SECONDS = 0
    quantize(
        model,
        out,
        config=arbllm.BinarizationConfig(iterations=1),
        calibration="builtin",
        windows=4,
        window_length=32,
        device="cpu",
        tune=4,
        distill=4,
    )


def in_child(work: Callable[[], object]) -> int:
    """Start some work in a child of this process, which must not have computed before; returns its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 2)
        work()
        status = 0
    finally:
        os._exit(status)


def die() -> None:
    """As if by kill -9 from outside."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_until_write(run: Job, out: Path, number: int) -> None:
    """The job, killed when half of its file number `number` is written."""
    write, count = output.write_whole, 0

    def half(file: Path, octets: bytes) -> None:
        nonlocal count
        count += 1
        if count == number:
            file.with_name(f"{file.name}.part").write_bytes(octets[: len(octets) // 2])
            die()
        write(file, octets)

    output.write_whole = half
    run(out)


def run_until_rename(run: Job, out: Path) -> None:
    """The job, killed when all is written and nothing in its place."""
    output._replace = lambda *_: die()
    run(out)


def killed(child: int, after: float | None = None) -> bool:
    """Wait for a child, and kill it after so many seconds; whether it was killed rather than done.

    Raises:
        RuntimeError: it failed by itself.
    """
    found, status = 0, 0
    if after is not None:
        deadline = time.monotonic() + after
        while not found and time.monotonic() < deadline:
            found, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.002)
        if not found:
            os.kill(child, signal.SIGKILL)
    if not found:
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise RuntimeError("a job failed by itself")
    return False


def kill_and_resume(directory: Path, kills: int = 10, seed: int = 0) -> Outcome:
    """Run a job to its end, and another one that is killed again and again; compare.

    Args:
        directory: an empty directory.
        kills: how many; at least four.
        seed: of the moments.
    """
    chance, outcome = random.Random(seed), Outcome()
    child = in_child(partial(make_model, directory / "dense"))
    assert not killed(child)
    run: Job = partial(job, directory / "dense")
    start = time.monotonic()
    assert not killed(in_child(partial(run, directory / "whole")))
    whole_time = time.monotonic() - start
    out, kept = directory / "killed", directory / ".killed.unfinished"
    kinds = ["write"] * 3 + ["moment"] * (kills - 4)
    chance.shuffle(kinds)
    for kind in [*kinds, "rename"]:
        while True:
            if kind == "write":  # the first one writes the manifest, too
                number = chance.choice([1, 2]) if kept.exists() else chance.choice([1, 2, 3])
                gone = killed(in_child(partial(run_until_write, run, out, number)))
            elif kind == "rename":
                gone = killed(in_child(partial(run_until_rename, run, out)))
            else:
                gone = killed(in_child(partial(run, out)), chance.uniform(*MOMENTS) * whole_time)
            if gone:
                break
            _start_again(out)  # it was done sooner
        blocks = len(list(kept.glob("block-*.safetensors")))
        outcome.finished.append(blocks)
        outcome.moments.append(f"{kind}: {', '.join(sorted(p.name for p in kept.iterdir())) if kept.exists() else ''}")
    assert not killed(in_child(partial(run, out)))
    outcome.same = all((out / name).read_bytes() == (directory / "whole" / name).read_bytes() for name in WRITTEN)
    outcome.left_over = sorted(path.name for path in directory.iterdir() if path.name.startswith("."))
    return outcome


def _start_again(out: Path) -> None:
    for path in out.iterdir():
        path.unlink()
    out.rmdir()


def main() -> None:
    """Print what was kept at each kill, and whether the end is the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        outcome = kill_and_resume(Path(directory), options.kills, options.seed)
    for number, moment in enumerate(outcome.moments, start=1):
        print(f"kill {number}, {moment}")
    same = "the same, bit for bit" if outcome.same else "NOT the same"
    print(f"{len(outcome.moments)} kills; the checkpoint is {same}; left over: {outcome.left_over or 'nothing'}")
    raise SystemExit(0 if outcome.same and not outcome.left_over else 1)


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    main()
