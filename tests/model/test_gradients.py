from functools import partial

import pytest
import torch
from torch import nn

from arbllm.model.gradients import watch_gradients
from arbllm.model.walk import find_blocks
from tests.model.tiny_models import MODELS, random_windows, tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", MODELS)
def test_equal_those_of_one_backward_pass_through_the_whole_model(name, monkeypatch):
    monkeypatch.setattr("arbllm.model.head.LOGIT_BYTES", 4 * 96 * 5)  # pieces of five tokens, the last one shorter
    model, windows = tiny_model(name), random_windows()[:2]
    blocks = find_blocks(model)
    seen: dict[str, list] = {}
    watch_gradients(
        model, blocks, windows, CPU, lambda linear, *tensors: seen.setdefault(linear.name, []).append(tensors)
    )
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, _: nn.Module, __: object, output: torch.Tensor) -> None:
        output.retain_grad()
        outputs[name] = output

    linears = [linear for block in blocks for linear in block.linears]
    for linear in linears:
        linear.module.register_forward_hook(partial(keep, linear.name))
    assert {linear.name for linear in linears if not linear.routed} <= seen.keys()
    for window in windows:
        outputs.clear()
        logits = model(input_ids=window[None, :-1], use_cache=False).logits
        nn.functional.cross_entropy(logits[0], window[1:], reduction="sum").backward()
        for key, output in outputs.items():  # not those of experts that no token of this window came to
            value, gradient = seen[key].pop(0)
            torch.testing.assert_close(value, output.detach())
            torch.testing.assert_close(gradient, output.grad, rtol=1e-4, atol=1e-6)
    assert not any(seen.values())


def test_leaves_the_model_as_it_was():
    model, window = tiny_model("llama").to(torch.bfloat16), random_windows()[:1]
    before = model(window).logits
    watch_gradients(model, find_blocks(model), window, CPU, lambda *_: None)
    assert torch.equal(model(window).logits, before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
