import pytest
import torch
from torch import nn

from arbllm.baselines import gptq, round_to_nearest
from arbllm.difference import output_error
from arbllm.errors import ModelError
from arbllm.factor import factorize
from arbllm.model.capture import capture_inputs, gather_hessians, propagate
from arbllm.model.events import BlockFinished, BlockStarted, JobStarted, LinearQuantized
from arbllm.model.rounding import round_model
from arbllm.model.walk import find_blocks
from tests.model.tiny_models import random_windows, tiny_model

CPU = torch.device("cpu")


def three_bits(weight, factor):
    return gptq(weight, factor.hessian, 3, group_size=16, factor=factor)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_linear_is_calibrated_on_what_the_rounded_prefix_produces(name):
    """The same job spelled out: block by block, each on the outputs of the rounded ones before."""
    model, windows = tiny_model(name), random_windows()
    records = {record.name: record for record in round_model(model, windows, three_bits, nominal_bits=3)}
    dense = tiny_model(name)
    blocks = find_blocks(dense)
    hidden, calls = capture_inputs(dense, blocks, windows, CPU)
    for block, call in zip(blocks, calls, strict=True):
        for group in gather_hessians(block, call, hidden):
            for linear in group.linears:
                expected = gptq(linear.weight, group.hessian, 3, group_size=16, factor=factorize(group.hessian))
                error = output_error(linear.weight, expected.weight, group.hessian)
                record = records.pop(linear.name)
                assert record.output_error == pytest.approx(error)
                assert (record.rows, record.columns) == linear.weight.shape
                assert record.true_bits == expected.true_bits > record.nominal_bits == 3
                linear.set_weight(expected.weight)
        propagate(block, call, hidden)
    assert not records
    for (name, mine), other in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_the_model_stays_an_ordinary_one_in_its_dtype():
    model = tiny_model("llama").half()
    kinds = {name: type(module) for name, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    round_model(model, random_windows(), lambda weight, _: round_to_nearest(weight, 8), nominal_bits=8)
    assert kinds == {name: type(module) for name, module in model.named_modules()}
    linears = {linear.name for block in find_blocks(model) for linear in block.linears}
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float16
        changed = not torch.equal(tensor, before[name])
        assert changed == (name.removesuffix(".weight") in linears), name


def test_events_come_in_order():
    events: list = []
    model = tiny_model("llama")
    round_model(model, random_windows(), three_bits, nominal_bits=3, on_event=events.append)
    kinds = [JobStarted] + 3 * [BlockStarted, *7 * [LinearQuantized], BlockFinished]
    assert [type(event) for event in events] == kinds
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [event.name for event in events if isinstance(event, LinearQuantized)] == names[:-1]


def test_errors_name_the_layer():
    def fail(weight, factor):
        raise ModelError("no")

    with pytest.raises(ModelError, match=r"model.layers.0.self_attn.q_proj: no"):
        round_model(tiny_model("llama"), random_windows(), fail, nominal_bits=1)


def test_windows_that_do_not_fit_are_refused_at_once():
    with pytest.raises(ModelError, match="longer than the model's 64 positions"):
        round_model(tiny_model("llama"), random_windows(length=65), three_bits, nominal_bits=3)
