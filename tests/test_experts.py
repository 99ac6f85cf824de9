from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import arbllm
from arbllm.config import BinarizationConfig
from arbllm.errors import ModelError
from arbllm.experts import SplitExperts, fuse_experts, split_experts
from arbllm.integrations.dense import dense_model
from arbllm.integrations.transformers import mark_packed
from arbllm.model.quantize import quantize_model
from arbllm.model.training import Tuning
from arbllm.nn import BinaryLinear
from tests.model.tiny_models import MIXTURES, random_windows, tiny_model

CONFIG = BinarizationConfig(bits=2.5, iterations=1)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(random_windows()).logits


def experts(model: nn.Module) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith(".experts")]


@pytest.mark.parametrize("name", MIXTURES)
def test_split_they_compute_the_same_and_fused_again_they_are_what_they_were(name):
    model = tiny_model(name)
    expected, state = logits(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    split_experts(model)
    assert all(isinstance(module, SplitExperts) for module in experts(model))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    fuse_experts(model)
    assert torch.equal(logits(model), expected)
    again = model.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


def test_splitting_copies_nothing():
    model = tiny_model("mixtral")
    fused = experts(model)[0]
    storage = fused.gate_up_proj.data_ptr()
    split_experts(model)
    first, second = (experts(model)[0].get_submodule(f"{number}.gate_up_proj") for number in (0, 1))
    assert first.weight.data_ptr() == storage
    assert second.weight.data_ptr() == storage + first.weight.nbytes


@torch.no_grad()
def test_each_token_gets_the_sum_of_its_experts():
    split_experts(model := tiny_model("mixtral"))
    module = experts(model)[0]
    x, index = torch.randn(3, 32), torch.tensor([[0, 2], [3, 0], [1, 4]])  # 4 is none of the four
    weights = torch.rand(3, 2)
    expected = torch.zeros(3, 32)
    for token, slot in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]:
        expected[token] += weights[token, slot] * module.expert(int(index[token, slot]), x[token, None])[0]
    torch.testing.assert_close(module(x, index, weights), expected)
    assert module(x[:0], index[:0], weights[:0]).shape == (0, 32)


def test_narrow_experts_and_other_modules_stay_as_they_are():
    model = tiny_model("mixtral", intermediate_size=4)
    split_experts(model)
    assert not any(isinstance(module, SplitExperts) for module in model.modules())
    model = tiny_model("mixtral")
    for module in experts(model):
        module.register_parameter("something_else", nn.Parameter(torch.ones(4)))
    split_experts(model)
    assert not any(isinstance(module, SplitExperts) for module in model.modules())


def test_packed_experts_are_not_fused():
    model = tiny_model("mixtral")
    quantize_model(model, random_windows(), CONFIG)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.experts\.0\.gate_up_proj: is packed"):
        fuse_experts(model)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_packed_mixture_becomes_an_ordinary_model_again(name, tmp_path):
    model = tiny_model(name)
    quantize_model(model, random_windows(), CONFIG)
    mark_packed(model, {"binarization": CONFIG.to_dict()})
    model.save_pretrained(tmp_path / "packed")
    loaded = arbllm.load(tmp_path / "packed")
    expected = logits(loaded)
    dense_model(loaded).save_pretrained(tmp_path / "dense")
    opened, report = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(logits(opened), expected, atol=1e-4, rtol=1e-4)


def test_a_dense_mixture_is_written_as_its_makers_wrote_it(tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "original")
    quantize_model(model, random_windows(), CONFIG)
    mark_packed(model, {"binarization": CONFIG.to_dict()})
    model.save_pretrained(tmp_path / "packed")
    dense_model(arbllm.load(tmp_path / "packed")).save_pretrained(tmp_path / "dense")
    names = [load_file(tmp_path / name / "model.safetensors").keys() for name in ("original", "dense")]
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in names[0]
    assert names[0] == names[1]


def send_nothing_to(model: nn.Module, number: int) -> None:
    """Have the routers avoid an expert of a Mixtral."""

    def avoid(_: nn.Module, __: object, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        index = torch.where(output[2] == number, (number + 1) % 4, output[2])
        return (*output[:2], index)

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(avoid)


@pytest.mark.parametrize(
    "config", [CONFIG, BinarizationConfig("arb-rc", iterations=1)], ids=lambda config: config.method
)
def test_an_expert_that_no_token_came_to_is_quantized_by_its_weights(config):
    model = tiny_model("mixtral")
    weight = model.model.layers[1].mlp.experts.gate_up_proj[2].detach().clone()
    send_nothing_to(model, 2)
    with pytest.warns(
        UserWarning, match=r"layers\.1: no token .* came to 1 of its experts \(the first is .*experts\.2\)"
    ):
        results = quantize_model(model, random_windows(), config, tuning=Tuning(steps=2, length=16))
    packed = model.model.layers[1].mlp.experts.get_submodule("2.gate_up_proj")
    assert isinstance(packed, BinaryLinear)
    error = (packed.matrix.dequantize() - weight).norm() / weight.norm()
    assert error < 0.6
    assert all(result.output_error < 1 for result in results)
    assert logits(model).isfinite().all()


def test_experts_of_a_block_get_the_same_bits():
    model = tiny_model("mixtral")
    send_nothing_to(model, 2)
    with pytest.warns(UserWarning, match="no token"):
        results = quantize_model(model, random_windows(), CONFIG)
    for block in range(3):
        names = [f"model.layers.{block}.mlp.experts.{number}.down_proj" for number in range(4)]
        assert len({result.true_bits for result in results if result.name in names}) == 1
