import time
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from arbllm.config import ALLOCATIONS, BinarizationConfig
from arbllm.errors import ConfigError, ModelError
from arbllm.factor import Factor, factorize
from arbllm.model.capture import capture_inputs, gather_hessians, propagate
from arbllm.model.events import BlockFinished, BlockStarted, JobStarted, LinearQuantized
from arbllm.model.quantize import quantize_model
from arbllm.model.sensitivity import measured_shares
from arbllm.model.walk import find_blocks
from arbllm.nn import BinaryLinear
from arbllm.solver import quantize_matrix
from tests.model.tiny_models import random_windows, tiny_model

CONFIG = BinarizationConfig(iterations=2)
PAPER = BinarizationConfig("arb-rc", block_size=16, iterations=2)
CPU = torch.device("cpu")


@pytest.mark.parametrize("config", [CONFIG, PAPER], ids=["joint", "paper"])
def test_every_linear_is_calibrated_on_what_the_quantized_prefix_produces(config):
    """The same job spelled out: block by block, dense weights replaced by what the solver returns."""
    model, windows = tiny_model("llama"), random_windows()
    quantize_model(model, windows, config)
    dense = tiny_model("llama")
    blocks = find_blocks(dense)
    configs = {linear.name: config for block in blocks for linear in block.linears}
    if config.bits is not None:
        shares = measured_shares(dense, windows, config, CPU)
        configs = {name: replace(config, bits=share) for name, share in shares.items()}
    hidden, calls = capture_inputs(dense, blocks, windows, CPU)
    for block, call in zip(blocks, calls, strict=True):
        for group in gather_hessians(block, call, hidden):
            factor = factorize(group.hessian, shrinkage=group.sampling_error if config is CONFIG else 0.0)
            for linear in group.linears:
                expected = quantize_matrix(linear.weight, group.hessian, configs[linear.name], factor=factor)
                packed = model.get_submodule(linear.name).matrix
                assert packed.layout == expected.layout
                assert all(torch.equal(packed.tensors()[name], tensor) for name, tensor in expected.tensors().items())
                linear.set_weight(expected.dequantize())
        propagate(block, call, hidden)
    with torch.no_grad():
        torch.testing.assert_close(model(windows).logits, dense(windows).logits, rtol=1e-4, atol=1e-4)


def test_only_the_linears_of_the_blocks_change():
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize_model(model, random_windows(), CONFIG)
    packed = {name for name, module in model.named_modules() if isinstance(module, BinaryLinear)}
    assert len(packed) == 21
    assert [name for name, module in model.named_modules() if isinstance(module, nn.Linear)] == ["lm_head"]
    after = model.state_dict()
    kept = [name for name in before if name.rpartition(".")[0] not in packed]
    assert len(kept) == 9
    assert all(torch.equal(before[name], after[name]) for name in kept)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_the_budget_holds_for_the_whole_model(allocation):
    config = BinarizationConfig(bits=3.0, allocation=allocation, scale_block=16, iterations=0)
    results = quantize_model(tiny_model("llama"), random_windows(), config)
    stored = 8 * sum(result.bytes for result in results)
    assert stored <= 3.0 * sum(result.rows * result.columns for result in results)
    bits: dict[tuple[int, int], set[float]] = {(result.rows, result.columns): set() for result in results}
    for result in results:
        bits[result.rows, result.columns].add(result.true_bits)
    alike = all(len(found) == 1 for found in bits.values())
    assert alike == (allocation == "uniform")


def test_a_budget_that_cannot_be_kept_is_refused():
    with pytest.raises(ConfigError, match=r"at least 1\.\d+ bits a weight with scales, more than 1.1"):
        quantize_model(tiny_model("llama"), random_windows(), BinarizationConfig(bits=1.1))


def test_without_a_budget_nothing_is_measured(monkeypatch):
    monkeypatch.setattr("arbllm.model.sensitivity.measured_shares", lambda *_: pytest.fail("measured"))
    for config in (PAPER, BinarizationConfig(allocation="uniform", iterations=0)):
        quantize_model(tiny_model("llama", num_hidden_layers=1), random_windows(), config)


def test_events_tell_the_whole_job():
    events: list = []
    model = tiny_model("llama")
    results = quantize_model(model, random_windows(), CONFIG, on_event=events.append)
    assert events[0] == JobStarted(blocks=3, linears=21, weights=3 * (32 * 32 * 2 + 16 * 32 * 2 + 56 * 32 * 3))
    kinds = [type(event) for event in events[1:]]
    assert kinds == 3 * [BlockStarted, *7 * [LinearQuantized], BlockFinished]
    assert [event for event in events if isinstance(event, LinearQuantized)] == results
    for result in results:
        packed = model.get_submodule(result.name)
        assert (result.rows, result.columns) == packed.matrix.shape
        assert (result.bytes, result.true_bits) == (packed.matrix.nbytes, packed.matrix.true_bits)
        assert 0 < result.output_error < 1
        assert 0 < result.weight_error < 1
        assert result.name.startswith(f"model.layers.{result.block}.")
        assert result.damping == CONFIG.damping
    finished = [event for event in events if isinstance(event, BlockFinished)]
    for event in finished:
        assert event.seconds >= event.capture_seconds + event.solve_seconds + event.propagate_seconds
        assert event.tune_seconds < event.seconds / 10
        assert event.peak_memory_bytes > 10**6
        assert all(0 < result.seconds < event.solve_seconds for result in results if result.block == event.block)
    assert finished[0].to_dict()["event"] == "block_finished"
    assert list(finished[0].to_dict())[:3] == ["event", "block", "blocks"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
@pytest.mark.parametrize(("config", "scales"), [(CONFIG, torch.uint8), (PAPER, torch.float16)], ids=["joint", "paper"])
def test_the_storage_dtype_stays(name, dtype, config, scales):
    model = tiny_model(name).to(dtype)
    quantize_model(model, random_windows(), config)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    packed = [module for module in model.modules() if isinstance(module, BinaryLinear)]
    assert {module.row_scales.dtype for module in packed} == {scales}
    assert any(module.bias is not None and module.bias.dtype == dtype for module in packed)
    assert torch.isfinite(model(random_windows()).logits).all()


def test_dense_weights_are_freed_block_by_block():
    model = tiny_model("llama")
    modules = [[weakref.ref(linear.module) for linear in block.linears] for block in find_blocks(model)]
    alive = []

    def count(event: object) -> None:
        if isinstance(event, BlockStarted):
            until = time.perf_counter() + 10  # a thread lets go of its last task a moment after it is done
            while any(module() for block in modules[: event.block] for module in block) and time.perf_counter() < until:
                time.sleep(0.001)
            alive.append([sum(module() is not None for module in block) for block in modules])

    quantize_model(model, random_windows(), CONFIG, on_event=count)
    assert alive == [[7, 7, 7], [0, 7, 7], [0, 0, 7]]


def test_the_last_block_is_not_propagated(monkeypatch):
    propagated = []
    monkeypatch.setattr("arbllm.model.quantize.propagate", lambda block, call, hidden: propagated.append(block.index))
    quantize_model(tiny_model("llama"), random_windows(), CONFIG)
    assert propagated == [0, 1]


def test_linears_with_the_same_input_share_a_factorisation(monkeypatch):
    factorized = []

    def count(hessian: Tensor, damping: float, shrinkage: float) -> Factor:
        factorized.append(hessian)
        return factorize(hessian, damping, shrinkage)

    monkeypatch.setattr("arbllm.model.quantize.factorize", count)
    quantize_model(tiny_model("llama"), random_windows(), CONFIG)
    assert len(factorized) == 3 * 4


def test_a_single_block():
    model = tiny_model("llama", num_hidden_layers=1)
    assert len(quantize_model(model, random_windows(), CONFIG)) == 7


def test_bad_weights_are_named_before_any_work(monkeypatch):
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.forward = lambda **_: pytest.fail("the model ran")
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.up_proj"):
        quantize_model(model, random_windows(), CONFIG)


def test_activations_that_overflow_name_the_layer_and_the_remedy():
    model = tiny_model("llama")
    model.model.layers[1].post_attention_layernorm.weight.data.fill_(1e30)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.gate_proj: its Hessian has NaN .*float32"):
        quantize_model(model, random_windows(), CONFIG)


def test_warnings_of_the_solver_name_the_layer(monkeypatch):
    def warn(hessian: Tensor, damping: float, shrinkage: float) -> Factor:
        warnings.warn("not positive definite", stacklevel=2)
        return factorize(hessian, damping, shrinkage)

    monkeypatch.setattr("arbllm.model.quantize.factorize", warn)
    with pytest.warns(UserWarning, match="not positive definite") as caught:
        quantize_model(tiny_model("llama", num_hidden_layers=1), random_windows(), CONFIG)
    layers = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    expected = [f"model.layers.0.{layer}: not positive definite" for layer in layers]
    assert [str(warning.message) for warning in caught] == expected


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.zeros(2, 65, dtype=torch.int64), "64 positions"),
        (torch.full((2, 8), 96), "token number 96"),
        (torch.zeros(0, 8, dtype=torch.int64), r"\[0, 8\]"),
        (torch.zeros(8, dtype=torch.int64), r"\[8\]"),
    ],
)
def test_windows_that_do_not_fit(windows, message):
    with pytest.raises(ModelError, match=message):
        quantize_model(tiny_model("llama"), windows, CONFIG)


def test_an_error_of_the_solver_names_the_layer():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1e7)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj: .*float16"):
        quantize_model(model, random_windows(), CONFIG)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_records_come_in_the_model_s_order_and_the_number_of_threads_is_put_back(threads):
    before = torch.get_num_threads()
    model = tiny_model("llama")
    names = [linear.name for block in find_blocks(model) for linear in block.linears]
    try:
        torch.set_num_threads(threads)
        results = quantize_model(model, random_windows(), CONFIG)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert [result.name for result in results] == names
