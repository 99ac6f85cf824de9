import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from arbllm.errors import ModelError
from arbllm.model.capture import BlockCall, capture_inputs, compute_dtype, gather_hessians, propagate, resident
from arbllm.model.walk import DecoderBlock, Linear, find_blocks
from tests.model.tiny_models import MODELS, random_windows, tiny_model

CPU = torch.device("cpu")


def block_states(model: PreTrainedModel, blocks: list[DecoderBlock], windows: Tensor) -> list[Tensor]:
    """What enters each block, and leaves the last, in the model's own forward pass."""
    states: list[Tensor] = []

    def keep_input(_: nn.Module, args: tuple, kwargs: dict) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def keep_output(_: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])

    hooks = [block.module.register_forward_pre_hook(keep_input, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].module.register_forward_hook(keep_output))
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_states_carried_block_by_block_are_those_of_the_whole_model(name, attention):
    model = tiny_model(name, attn_implementation=attention)
    windows, blocks = random_windows(), find_blocks(model)
    expected = block_states(model, blocks, windows)
    hidden, calls = capture_inputs(model, blocks, windows, CPU)
    torch.testing.assert_close(hidden, expected[0])
    for block, call, output in zip(blocks, calls, expected[1:], strict=True):
        before = hidden.clone()
        propagate(block, call, hidden)
        assert not torch.allclose(hidden, before, atol=1e-2)
        torch.testing.assert_close(hidden, output)


def test_the_model_runs_as_before_once_captured():
    model, windows = tiny_model("llama"), random_windows()
    before = model(windows).logits
    blocks = find_blocks(model)
    capture_inputs(model, blocks, windows, CPU)
    assert not any("forward" in vars(block.module) for block in blocks)
    torch.testing.assert_close(model(windows).logits, before, rtol=0, atol=0)


def test_a_forward_method_set_by_others_is_put_back():
    model = tiny_model("llama")
    block = find_blocks(model)[1].module
    block.forward = replaced = block.forward
    capture_inputs(model, find_blocks(model), random_windows(), CPU)
    assert block.forward is replaced


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-new", "gpt-neox"])
def test_hessians_are_the_second_moments_of_the_inputs(name):
    model = tiny_model(name)
    windows, blocks = random_windows(), find_blocks(model)
    inputs: dict[str, Tensor] = {}

    def keep(layer: str):
        return lambda _, args: inputs.update({layer: args[0].reshape(-1, args[0].shape[-1])})

    hooks = [linear.module.register_forward_pre_hook(keep(linear.name)) for linear in blocks[0].linears]
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    hidden, calls = capture_inputs(model, blocks, windows, CPU)
    before = hidden.clone()
    groups = gather_hessians(blocks[0], calls[0], hidden)
    assert torch.equal(hidden, before)
    assert [linear.name for group in groups for linear in group.linears] == [
        linear.name for linear in blocks[0].linears
    ]
    for group in groups:
        for linear in group.linears:
            x = inputs[linear.name].double()
            torch.testing.assert_close(group.hessian.double(), 2 / len(x) * x.T @ x, rtol=1e-4, atol=1e-5)


def test_linears_with_the_same_input_share_a_hessian():
    model = tiny_model("llama")
    blocks = find_blocks(model)
    hidden, calls = capture_inputs(model, blocks, random_windows(), CPU)
    shared = [
        [linear.name.rpartition(".")[2] for linear in group.linears]
        for group in gather_hessians(blocks[0], calls[0], hidden)
    ]
    assert shared == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_a_tensor_changed_in_between_is_another_input():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, hidden_states: Tensor) -> Tensor:
            first = self.first(hidden_states)
            hidden_states += 1
            return first + self.second(hidden_states)

    module = Block()
    linears = tuple(Linear(name, child, transposed=False) for name, child in module.named_children())
    hidden = torch.randn(2, 5, 8)
    call = BlockCall((), {}, by_name=False)
    first, second = gather_hessians(DecoderBlock(0, "block", module, linears), call, hidden)
    x = hidden.reshape(-1, 8)
    torch.testing.assert_close(first.hessian, x.T @ x / 5)
    torch.testing.assert_close(second.hessian, (x + 1).T @ (x + 1) / 5)


def test_blocks_that_take_their_input_by_name():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: ((), {**kwargs, "hidden_states": args[0]}) if args else None, with_kwargs=True
        )
    windows, blocks = random_windows(), find_blocks(model)
    expected = block_states(model, blocks, windows)
    hidden, calls = capture_inputs(model, blocks, windows, CPU)
    assert calls[0].by_name
    for block, call in zip(blocks, calls, strict=True):
        propagate(block, call, hidden)
    torch.testing.assert_close(hidden, expected[-1])


def test_a_linear_that_never_runs_is_named():
    model = tiny_model("llama")
    model.model.layers[1].spare = nn.Linear(8, 8)
    blocks = find_blocks(model)
    hidden, calls = capture_inputs(model, blocks, random_windows(), CPU)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.spare: never ran"):
        gather_hessians(blocks[1], calls[1], hidden)

    def send_nothing(module, _):
        module.spare(torch.empty(0, 8))

    model.model.layers[1].register_forward_pre_hook(send_nothing)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.spare: never ran"):
        gather_hessians(blocks[1], calls[1], hidden)


def test_blocks_out_of_order_are_refused():
    model = tiny_model("llama")
    blocks = find_blocks(model)
    with pytest.raises(ModelError, match="one after the other"):
        capture_inputs(model, [blocks[1], blocks[0], blocks[2]], random_windows(), CPU)


def test_a_block_that_is_never_called_is_named():
    model = tiny_model("llama")
    model.config.num_hidden_layers = 2
    with pytest.raises(ModelError, match=r"model\.layers\.2: the model never calls"):
        capture_inputs(model, find_blocks(model), random_windows(), CPU)


def test_arguments_that_depend_on_the_text_are_refused():
    model = tiny_model("llama")
    layers = model.model.layers
    seen: dict[str, Tensor] = {}
    model.model.embed_tokens.register_forward_hook(lambda _, args, output: seen.update(embedded=output))
    layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "extra": seen["embedded"]}), with_kwargs=True
    )
    with pytest.raises(ModelError, match="other values for each text"):
        capture_inputs(model, find_blocks(model), random_windows(), CPU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_blocks_compute_in_float32_on_a_cpu_and_come_back_unchanged(dtype):
    model = tiny_model("gemma3").to(dtype)
    windows, blocks = random_windows(), find_blocks(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hidden, calls = capture_inputs(model, blocks, windows, CPU)
    assert hidden.dtype == torch.float32
    for block, call in zip(blocks, calls, strict=True):
        with resident(block.module, CPU):
            assert {parameter.dtype for parameter in block.module.parameters()} == {torch.float32}
            propagate(block, call.to(CPU), hidden)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) and after[name].dtype == dtype for name, tensor in before.items())
    # Close to the float32 model with the same weights; the embeddings, and only they, were scaled in half precision.
    expected = block_states(model.float(), find_blocks(model), windows)[-1]
    assert (hidden - expected).norm() < 0.01 * expected.norm()


def test_half_precision_is_kept_on_a_gpu():
    assert compute_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    assert compute_dtype(torch.float16, CPU) == torch.float32
    assert compute_dtype(torch.bool, CPU) == torch.bool


@pytest.mark.parametrize("name", ["llama", "opt-350m", "falcon-alibi"])
def test_a_single_window_is_enough(name):
    model, windows = tiny_model(name), random_windows()
    blocks = find_blocks(model)
    hidden, _ = capture_inputs(model, blocks, windows[:1], torch.device("cpu"))
    assert torch.equal(hidden, capture_inputs(model, blocks, windows, torch.device("cpu"))[0][:1])
