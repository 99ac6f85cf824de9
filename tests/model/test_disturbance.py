import pytest
import torch
from torch import Tensor

from arbllm.model.disturbance import DEPTHS, group_linears, measure_divergences
from arbllm.model.walk import Linear, find_blocks
from tests.model.tiny_models import random_windows, tiny_model

CPU = torch.device("cpu")


def errors_of(linears: list[Linear], size: float) -> dict[Linear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        linear: size * linear.weight.std() * torch.randn(linear.weight.shape, generator=generator) for linear in linears
    }


@pytest.mark.parametrize(("name", "kinds"), [("llama", 7), ("gpt2", 4), ("falcon", 4)])
def test_every_linear_is_in_one_group(name, kinds):
    blocks = find_blocks(tiny_model(name))
    groups = group_linears(blocks)
    assert len(groups) == kinds * min(DEPTHS, len(blocks))
    found = [linear for linears in groups.values() for linear in linears]
    wanted = [linear for block in blocks for linear in block.linears]
    assert len(found) == len(wanted)
    assert set(found) == set(wanted)


def test_experts_are_of_one_kind():
    blocks = find_blocks(tiny_model("llama"))
    for block in blocks:
        renamed = [
            Linear(f"{block.name}.experts.{number}.up", linear.module, linear.transposed)
            for number, linear in enumerate(block.linears)
        ]
        object.__setattr__(block, "linears", tuple(renamed))
    assert list(group_linears(blocks)) == [("experts.*.up", 0), ("experts.*.up", 1), ("experts.*.up", 2)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_divergences_are_those_of_a_model_with_these_errors(name):
    """By hand: errors added for good, and KL(before || after) by its definition."""
    model, windows = tiny_model(name), random_windows(3, 24)
    blocks = find_blocks(model)
    groups = group_linears(blocks)
    errors = errors_of([linear for block in blocks for linear in block.linears], 0.5)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = measure_divergences(model, groups, errors, windows, CPU)
    assert found.keys() == groups.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    group, linears = next(iter(groups.items()))
    with torch.no_grad():
        wanted = model(windows[1:]).logits.softmax(-1)
        for linear in linears:
            linear.set_weight(linear.weight + errors[linear])
        found_then = model(windows[1:]).logits.softmax(-1)
    expected = (wanted * (wanted / found_then).log()).sum(-1).mean()
    assert found[group] == pytest.approx(float(expected), rel=1e-3)
    assert found[group] > 0


def test_a_model_in_half_precision_is_put_back_bit_for_bit():
    model = tiny_model("llama").to(torch.bfloat16)
    blocks = find_blocks(model)
    errors = errors_of([linear for block in blocks for linear in block.linears], 0.5)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    measure_divergences(model, group_linears(blocks), errors, random_windows(), CPU)
    after = model.state_dict()
    assert all(torch.equal(tensor, before[key]) and tensor.dtype == before[key].dtype for key, tensor in after.items())


def test_larger_errors_move_predictions_more():
    model = tiny_model("llama")
    blocks = find_blocks(model)
    linears = [linear for block in blocks for linear in block.linears]
    groups = {("all", 0): linears}
    found = [
        measure_divergences(model, groups, errors_of(linears, size), random_windows(), CPU)["all", 0]
        for size in (0.0, 0.1, 0.5)
    ]
    assert found[0] == 0 < found[1] < found[2]
