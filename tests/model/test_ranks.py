import os
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
import torch
from torch import nn

from arbllm.errors import ConfigError, ModelError, RankError
from arbllm.format.checkpoint import verify
from arbllm.model.capture import InputGroup
from arbllm.model.ranks import Ranks, _heeding_torchrun, assign_owners, solve_cost
from arbllm.model.walk import Linear
from tests.model.rank_jobs import job, quantize_one_of, quantize_tiny, quantize_tiny_until, run_ranks
from tests.tiny import save_tiny, save_tiny_mixture

LAYERS = 3
WRITTEN = ("model.safetensors", "config.json")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"), layers=LAYERS)


@pytest.fixture(scope="module")
def alone(dense, tmp_path_factory):
    """What a single process makes."""
    return quantize_tiny(dense, tmp_path_factory.mktemp("alone") / "packed", {})


@pytest.fixture(scope="module")
def pair(dense, tmp_path_factory):
    """What two processes make."""
    directory = tmp_path_factory.mktemp("pair")
    return run_ranks(2, job(dense, directory / "packed"), directory)


def contents(out):
    return [(out / name).read_bytes() for name in WRITTEN]


def group(*shapes: tuple[int, int]) -> InputGroup:
    linears = tuple(Linear(f"{rows}", nn.Linear(columns, rows, device="meta"), False) for rows, columns in shapes)
    return InputGroup(linears, torch.eye(2), 1)


LLAMA = [group((64, 64), (16, 64), (17, 64)), group((65, 64)), group((224, 64), (225, 64)), group((66, 224))]


def test_every_linear_has_an_owner_and_the_dearest_ones_have_different_ones():
    for count in (1, 2, 4, 64):
        owners = assign_owners(LLAMA, count)
        names = {linear.name: owner for linear, owner in owners.items()}
        assert sorted(names) == ["16", "17", "224", "225", "64", "65", "66"]
        assert set(names.values()) == set(range(min(count, 7)))
        assert assign_owners(LLAMA, count) == owners
    assert len({names["66"], names["224"], names["225"]}) == 3


def test_ranks_have_about_as_much_to_solve():
    owners = assign_owners(LLAMA, 2)
    loads = [sum(solve_cost(linear) for linear, owner in owners.items() if owner == rank) for rank in range(2)]
    assert max(loads) < 1.4 * min(loads)


def test_a_single_process_has_everything_to_itself():
    ranks, windows = Ranks(), torch.arange(6).reshape(3, 2)
    assert ranks.first
    assert torch.equal(ranks.share(windows), windows)
    assert ranks.told(lambda: "anything") == "anything"
    assert ranks.mean(2.5) == 2.5
    ranks.check_same(object(), "objects")


def test_windows_are_shared_out_whole():
    windows, ranks = torch.arange(18).reshape(9, 2), Ranks()
    ranks.count = 4
    shares = []
    for ranks.rank in range(4):
        shares.append(ranks.share(windows))
    assert [len(share) for share in shares] == [3, 2, 2, 2]
    assert torch.equal(torch.cat(shares), windows)
    with pytest.raises(ConfigError, match=r"3 windows are too few for 4 processes; use more \(--windows\)"):
        ranks.share(windows[:3])


def check_same_quality(summaries, alone, perplexity=0.005):
    for summary in summaries:
        assert summary["linears"] == alone["linears"]
        assert summary["true_bits_per_weight"] == pytest.approx(alone["true_bits_per_weight"], rel=1e-3)
        assert summary["output_error"] == pytest.approx(alone["output_error"], rel=0.02)
        assert summary["perplexity"] == pytest.approx(alone["perplexity"], rel=perplexity)


def test_two_ranks_make_as_good_a_checkpoint(pair, alone):
    check_same_quality(pair, alone)
    assert pair[0] == pair[1]
    verify(pair[0]["path"])


def test_four_ranks_make_as_good_a_checkpoint(dense, alone, tmp_path):
    """Of bits measured at rank 0, as those of two."""
    check_same_quality(run_ranks(4, job(dense, tmp_path / "packed"), tmp_path), alone)


def test_without_tuning_ranks_change_nothing_but_rounding(dense, tmp_path):
    single = quantize_tiny(dense, tmp_path / "alone", {"tune": 0})
    first, _ = run_ranks(2, job(dense, tmp_path / "packed", tune=0, stream=False), tmp_path)
    assert first["output_error"] == pytest.approx(single["output_error"], rel=1e-3)
    assert first["perplexity"] == pytest.approx(single["perplexity"], rel=1e-3)


def test_ranks_share_out_experts(tmp_path):
    dense = save_tiny_mixture(tmp_path / "dense")
    single = quantize_tiny(dense, tmp_path / "alone", {})
    made = run_ranks(2, job(dense, tmp_path / "packed"), tmp_path)
    check_same_quality(made, single, perplexity=0.02)  # of random weights, a little may send tokens elsewhere
    verify(made[0]["path"])


def test_a_rank_that_dies_ends_the_job_and_the_same_command_goes_on(dense, pair, tmp_path):
    """What comes of it is bit for bit what two ranks make undisturbed, each time that they do."""
    out = tmp_path / "packed"
    work = partial(quantize_tiny_until, 1, 1, dense, out, {})
    error, killed = run_ranks(2, work, tmp_path)
    assert killed is None
    assert isinstance(error, RankError)
    assert "rank 0: another process of this job has ended" in str(error)
    kept = tmp_path / ".packed.unfinished"
    assert [path.name for path in kept.glob("block-*")] == ["block-00000.safetensors"]
    run_ranks(2, job(dense, out), tmp_path)
    assert contents(out) == contents(pair[0]["path"])
    assert not kept.exists()


def test_ranks_with_different_models_are_refused(dense, tmp_path):
    other = save_tiny(tmp_path / "other", layers=LAYERS, rms_norm_eps=1e-4, tie_word_embeddings=True)
    first, second = run_ranks(2, partial(quantize_one_of, (dense, other), tmp_path / "packed"), tmp_path)
    assert isinstance(second, ModelError)
    assert "rank 1: its model or versions of libraries differ from those of rank 0" in str(second)
    assert isinstance(first, RankError)
    assert not (tmp_path / "packed").exists()


def test_a_signal_does_not_disturb_who_has_noticed_already():
    """While what a rank has begun is cleared away."""
    before, cleared = signal.getsignal(signal.SIGTERM), []

    def notice_and_clear():
        try:
            raise RankError("noticed")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleared.append(True)

    try:
        with pytest.raises(RankError, match="noticed"), _heeding_torchrun():
            notice_and_clear()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert cleared


def torchrun(dense, out):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--calibration", "builtin", "--windows", "4", "--window-length", "64", "--device", "cpu", "--tune", "2"]
    command = [*launcher, "-m", "arbllm", "quantize", str(dense), str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_rank_1(process, file):
    """As soon as a file is there."""
    while not file.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    next(child for child in children if child.environ().get("RANK") == "1").kill()


def test_torchrun(tmp_path):
    dense = save_tiny(tmp_path / "dense", layers=30)
    out = tmp_path / "packed"
    process = torchrun(dense, out)
    kill_rank_1(process, tmp_path / ".packed.unfinished" / "block-00001.safetensors")
    _, stderr = process.communicate()
    assert process.returncode
    assert "error: rank 0: another process of this job has ended" in stderr
    assert "what is finished is kept" in stderr
    process = torchrun(dense, out)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert (stdout.count("true bits a weight"), stderr.count("block 30/30")) == (1, 1)
    verify(out)
