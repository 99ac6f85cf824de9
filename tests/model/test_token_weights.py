import pytest
import torch

from arbllm.config import BinarizationConfig
from arbllm.errors import ConfigError, ModelError
from arbllm.model.capture import capture_inputs, gather_hessians
from arbllm.model.events import WindowWeighed
from arbllm.model.gradients import watch_gradients
from arbllm.model.quantize import quantize_model
from arbllm.model.ranks import Ranks
from arbllm.model.token_weights import weigh_tokens
from arbllm.model.walk import find_blocks
from tests.model.tiny_models import random_windows, tiny_model

CPU = torch.device("cpu")
CONFIG = BinarizationConfig(bits=3.0, iterations=1, allocation="uniform", token_weights="gradient")


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_weights_are_in_proportion_to_the_gradients(name):
    model, windows = tiny_model(name), random_windows()
    blocks = find_blocks(model)
    norms: dict = {}
    watch_gradients(
        model, blocks, windows, CPU, lambda linear, _, g: norms.setdefault(linear, []).append(g[0].norm(dim=1))
    )
    weights = weigh_tokens(model, blocks, windows, CPU, Ranks())
    assert list(weights) == [linear for block in blocks for linear in block.linears]
    for linear, found in weights.items():
        assert found.shape == windows.shape
        assert float(found.mean()) == pytest.approx(1, rel=1e-5)
        assert not found[:, -1].any()
        expected = torch.stack(norms[linear])
        torch.testing.assert_close(found[:, :-1] / found.sum(), expected / expected.sum())


def test_hessians_weigh_each_token():
    model, windows = tiny_model("llama"), random_windows()
    blocks = find_blocks(model)
    generator = torch.Generator().manual_seed(2)
    weights = {linear: torch.rand(windows.shape, generator=generator) for linear in blocks[0].linears}
    hidden, calls = capture_inputs(model, blocks, windows, CPU)
    inputs: dict = {}
    hooks = [
        linear.module.register_forward_pre_hook(lambda _, args, linear=linear: inputs.update({linear: args[0]}))
        for linear in blocks[0].linears
    ]
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    groups = gather_hessians(blocks[0], calls[0], hidden, weights=weights)
    assert [group.linears for group in groups] == [(linear,) for linear in blocks[0].linears]
    for group in groups:
        x, w = inputs[group.linears[0]].double(), weights[group.linears[0]].double()
        expected = torch.einsum("wt,wti,wtj->ij", w, x, x) * 2 / w.numel()
        torch.testing.assert_close(group.hessian.double(), expected, rtol=1e-4, atol=1e-5)


def test_equal_weights_change_nothing():
    model, windows = tiny_model("llama"), random_windows()
    blocks = find_blocks(model)
    hidden, calls = capture_inputs(model, blocks, windows, CPU)
    ones = {linear: torch.ones(windows.shape) for linear in blocks[0].linears}
    plain = {
        linear: group.hessian for group in gather_hessians(blocks[0], calls[0], hidden) for linear in group.linears
    }
    for group in gather_hessians(blocks[0], calls[0], hidden, weights=ones):
        torch.testing.assert_close(group.hessian, plain[group.linears[0]])


def test_errors_are_those_of_weighted_tokens():
    """With other weights the same linears are solved otherwise, and every window is told of."""
    windows = random_windows()
    events: list = []
    weighted, plain = (
        quantize_model(tiny_model("llama"), windows, config, on_event=events.append)
        for config in (CONFIG, BinarizationConfig(**(CONFIG.to_dict() | {"token_weights": "equal"})))
    )
    told = [event for event in events if isinstance(event, WindowWeighed)]
    assert told == [WindowWeighed(done, len(windows)) for done in range(1, len(windows) + 1)]
    assert [each.output_error for each in weighted] != [each.output_error for each in plain]


def test_a_gradient_that_is_not_finite_names_the_layer():
    model = tiny_model("llama")
    model.lm_head.weight.data.fill_(torch.inf)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj: the gradient .*choose token weights"):
        weigh_tokens(model, find_blocks(model), random_windows(), CPU, Ranks())


def test_a_streamed_model_is_refused():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="token_weights 'gradient' needs the whole model"):
        quantize_model(model, random_windows(), CONFIG, load_block=lambda _: None)
