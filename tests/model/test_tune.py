import copy
import math

import pytest
import torch
from torch import Tensor, nn

from arbllm.config import BinarizationConfig
from arbllm.errors import ConfigError
from arbllm.format.matrix import BinaryMatrix
from arbllm.model.capture import capture_inputs, gather_hessians, propagate
from arbllm.model.events import BlockFinished, BlockStarted, BlockTuned, LinearQuantized
from arbllm.model.quantize import quantize_model
from arbllm.model.training import Best, Trainer, Tuning
from arbllm.model.tune import Tuned, norm_weights, relative_error, tune_block
from arbllm.model.walk import DecoderBlock, Linear, find_blocks
from arbllm.nn import BinaryLinear
from arbllm.solver import quantize_matrix
from arbllm.tunable import TunableLinear
from tests.helpers import random_matrix
from tests.model.tiny_models import random_windows, tiny_model

CONFIG = BinarizationConfig(bits=2.6, iterations=2)
ARCHITECTURES = ["llama", "gpt2"]
CPU = torch.device("cpu")


def norms_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_parameters() if value.ndim == 1 and "weight" in name}


class Job:
    """The first block of a model, solved, with what it reads and what the dense block puts out."""

    def __init__(self, name: str, windows: int = 9) -> None:
        self.model = tiny_model(name, **({"n_layer": 1} if name == "gpt2" else {"num_hidden_layers": 1}))
        self.block: DecoderBlock = find_blocks(self.model)[0]
        self.hidden, calls = capture_inputs(self.model, [self.block], random_windows(windows, 16), CPU)
        self.call = calls[0]
        self.targets = torch.empty_like(self.hidden)
        self.matrices: dict[Linear, BinaryMatrix] = {}
        for group in gather_hessians(self.block, self.call, self.hidden, self.targets):
            for linear in group.linears:
                self.matrices[linear] = quantize_matrix(linear.weight, group.hessian, CONFIG)
        self.modules = {linear: linear.module for linear in self.matrices}

    def tune(self, tuning: Tuning) -> Tuned:
        return tune_block(self.block, self.call, self.hidden, self.targets, self.matrices, tuning)

    @torch.no_grad()
    def loss(self, matrices: dict[Linear, BinaryMatrix], windows: slice) -> float:
        """The block's loss with these matrices, its norms being as they are now."""
        for linear, matrix in matrices.items():
            packed = BinaryLinear.from_matrix(matrix, linear.module.bias, linear.transposed)
            self.model.set_submodule(linear.name, packed)
        losses = [
            relative_error(self.call(self.block.module, hidden[None]), target[None])
            for hidden, target in zip(self.hidden[windows], self.targets[windows], strict=True)
        ]
        return float(torch.stack(losses).mean())


HELD_OUT = slice(8, 9)  # of nine windows


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_on_held_out_windows_falls(name):
    untuned = Job(name)
    start = untuned.loss(untuned.matrices, HELD_OUT)
    job = Job(name)
    tuned = job.tune(Tuning(steps=40))
    assert tuned.before == pytest.approx(start, rel=1e-3)
    assert tuned.after < tuned.before
    assert 0 < tuned.steps <= 40
    # What is kept is as good as was measured, but for the rounding of its scales.
    assert job.loss(tuned.matrices, HELD_OUT) == pytest.approx(tuned.after, rel=0.02)
    assert tuned.matrices.keys() == job.matrices.keys()
    for linear, matrix in tuned.matrices.items():
        assert matrix.layout == job.matrices[linear].layout
        assert torch.equal(matrix.signs, job.matrices[linear].signs)


@pytest.mark.parametrize("rate", [1e-6, 3e-3, 0.3])
def test_the_loss_never_rises_whatever_the_rate(rate):
    tuned = Job("llama").tune(Tuning(steps=12, rate=rate))
    assert tuned.after <= tuned.before
    assert (tuned.after == tuned.before) == (tuned.steps == 0)


def test_where_nothing_is_gained_everything_stays(monkeypatch):
    job = Job("llama")
    norms, packed = norms_of(job.block.module), job.matrices
    monkeypatch.setattr("arbllm.model.training.Trainer.step", spoil)
    tuned = job.tune(Tuning(steps=8))
    assert (tuned.steps, tuned.after) == (0, tuned.before)
    assert all(torch.equal(norms[name], value) for name, value in norms_of(job.block.module).items())
    for linear, matrix in tuned.matrices.items():
        assert all(torch.equal(matrix.tensors()[name], kept) for name, kept in packed[linear].tensors().items())


def spoil(trainer: Trainer, step: int, loss: Tensor) -> None:
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter.add_(1.0)


def test_norms_are_tuned_and_everything_else_stays_as_it_was():
    job = Job("llama")
    norms = norms_of(job.block.module)
    job.tune(Tuning(steps=8))
    after = norms_of(job.block.module)
    assert len(norms) == 2
    assert all(not torch.equal(norms[name], after[name]) for name in norms)
    assert not any(parameter.requires_grad for parameter in job.block.module.parameters())
    assert all(parameter.grad is None for parameter in job.block.module.parameters())
    assert all(isinstance(job.model.get_submodule(linear.name), TunableLinear) for linear in job.matrices)


def test_inputs_and_targets_are_not_changed():
    job = Job("gpt2")
    hidden, targets = job.hidden.clone(), job.targets.clone()
    job.tune(Tuning(steps=4))
    assert torch.equal(job.hidden, hidden)
    assert torch.equal(job.targets, targets)


def test_the_same_seed_gives_the_same_bits():
    (first, second), other = (Job("llama").tune(Tuning(steps=8)) for _ in range(2)), None
    assert first[1:] == second[1:]
    for one, two in zip(first.matrices.values(), second.matrices.values(), strict=True):
        assert all(torch.equal(one.tensors()[name], two.tensors()[name]) for name in one.tensors())
    other = Job("llama").tune(Tuning(steps=8, seed=5))
    assert other.before == first.before
    assert other.after != first.after


@pytest.mark.parametrize("windows", [1, 2])
def test_few_windows(windows):
    tuned = Job("llama", windows).tune(Tuning(steps=4))
    assert tuned.after <= tuned.before


def test_methods_without_column_scales_are_refused():
    job = Job("llama")
    matrices = {linear: random_matrix(*matrix.shape, row_means=True) for linear, matrix in job.matrices.items()}
    with pytest.raises(ConfigError, match="arb-rc and arb-rcx"):
        tune_block(job.block, job.call, job.hidden, job.targets, matrices, Tuning(steps=1))


# In a whole model.


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_whole_model(name):
    events: list = []
    model, windows = tiny_model(name), random_windows(4)
    norms = norms_of(model)
    results = quantize_model(model, windows, CONFIG, tuning=Tuning(steps=4), on_event=events.append)
    linears = len(results) // 3
    kinds = [type(event) for event in events[1:]]
    assert kinds == 3 * [BlockStarted, *linears * [LinearQuantized], BlockTuned, BlockFinished]
    tuned = [event for event in events if isinstance(event, BlockTuned)]
    assert [(event.block, event.blocks) for event in tuned] == [(0, 3), (1, 3), (2, 3)]
    assert all(event.after <= event.before and event.steps <= 4 for event in tuned)
    assert any(event.after < event.before for event in tuned)
    for event in events:
        if isinstance(event, BlockFinished):
            assert event.tune_seconds >= tuned[event.block].seconds > 0
    after = norms_of(model)
    final = {"llama": "model.norm.weight", "gpt2": "transformer.ln_f.weight"}[name]
    assert torch.equal(norms.pop(final), after.pop(final))
    assert any(not torch.equal(norms[key], after[key]) for key in norms)
    packed = [module for module in model.modules() if isinstance(module, BinaryLinear)]
    assert len(packed) == len(results)
    assert {module.transposed for module in packed} == {name == "gpt2"}
    assert torch.isfinite(model(windows).logits).all()


def test_a_model_in_half_precision_keeps_its_dtypes():
    model = tiny_model("llama", num_hidden_layers=1).to(torch.bfloat16)
    quantize_model(model, random_windows(), CONFIG, tuning=Tuning(steps=2))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# Parts.


def test_relative_error():
    target = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    output = torch.tensor([[[3.0, 5.0], [1.0, 2.0]]])
    assert float(relative_error(output, target)) == pytest.approx((1 / 25 + 1 / 4) / 2)
    assert float(relative_error(target.half(), target)) == 0
    assert math.isfinite(float(relative_error(output, torch.zeros_like(target))))


@pytest.mark.parametrize(
    ("name", "wanted"), [("llama", 2), ("gpt2", 2), ("gemma3", 6), ("qwen3", 4), ("falcon", 1), ("falcon-new", 2)]
)
def test_norm_weights(name, wanted):
    block = find_blocks(tiny_model(name))[0]
    found = norm_weights(block.module)
    assert len(found) == wanted
    assert all(parameter.ndim == 1 for parameter in found)


def test_the_best_state_is_kept_and_patience_ends():
    parameter = nn.Parameter(torch.zeros(2))
    best = Best([parameter], 1.0)
    offered = []
    for step, loss in enumerate([0.9, 1.1, 0.8, 0.85, 0.8], start=1):
        parameter.data.fill_(step)
        offered.append(best.offer(loss, step))
    assert offered == [True, True, True, True, False]
    assert (best.loss, best.step) == (0.8, 3)
    best.restore()
    assert parameter.tolist() == [3, 3]


def test_rates_fall_as_a_cosine_and_suit_each_norm():
    layer = TunableLinear(random_matrix(6, 8))
    norms = [nn.Parameter(torch.full((3,), size)) for size in (1.0, -20.0)]
    trainer = Trainer([layer], norms, Tuning(steps=4, rate=0.01))
    rates = []
    for step in range(4):
        loss = layer(torch.ones(1, 8)).square().sum() + sum(norm.square().sum() for norm in norms)
        trainer.step(step, loss)
        rates.append([group["lr"] for group in trainer._optimizer.param_groups])
    scales, small, large = zip(*rates, strict=True)
    assert scales == pytest.approx([0.01 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)])
    assert large == pytest.approx([20 * rate for rate in small])
    trainer.finish()
    assert not any(parameter.requires_grad for parameter in trainer.parameters)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_in_half_precision_learn_as_those_in_float32_do(dtype):
    """On a GPU models compute in half precision, where such gradients, their squares and such steps would be 0."""
    learnt = []
    for norm in (nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8, dtype=dtype))):
        trainer = Trainer([], [norm], Tuning(steps=40))
        for step in range(40):
            trainer.step(step, 3e-7 * norm.float().sum())
        trainer.finish()
        assert not norm.requires_grad
        assert norm.grad is None
        learnt.append(norm.detach().float())
    assert (learnt[0] < 0.99).all()
    torch.testing.assert_close(learnt[1], learnt[0], rtol=0, atol=0.004)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_are_tuned_toward_what_whole_windows_have_at_their_beginning(name, monkeypatch):
    """The dense model reads no more than that of a window, as what comes later makes no difference there."""
    model, windows, seen = tiny_model(name), random_windows(3, 24), []
    twin = copy.deepcopy(model)
    blocks = find_blocks(twin)
    dense, calls = capture_inputs(twin, blocks, windows, CPU)

    def look(block, call, hidden, targets, matrices, tuning, ranks):
        propagate(blocks[block.index], calls[block.index], dense)
        assert hidden.shape[:2] == targets.shape[:2] == (3, 16)
        torch.testing.assert_close(targets, dense[:, :16], rtol=1e-4, atol=1e-5)
        seen.append(block.index)
        return Tuned(matrices, 1.0, 1.0, 0)

    monkeypatch.setattr("arbllm.model.quantize.tune_block", look)
    quantize_model(model, windows, CONFIG, tuning=Tuning(length=16))
    assert seen == list(range(len(blocks)))


@pytest.mark.parametrize("first", [math.nan, math.inf])
def test_the_first_state_is_kept_whatever_its_loss(first):
    parameter = nn.Parameter(torch.ones(2))
    best = Best([parameter], first)
    parameter.data.zero_()
    best.restore()
    assert parameter.tolist() == [1, 1]
    assert best.offer(0.5, 1)
    assert (best.loss, best.step) == (0.5, 1)
