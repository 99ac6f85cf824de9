import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import arbllm
from arbllm.errors import ConfigError
from arbllm.export import export
from arbllm.integrations.peft import PackedLora, for_packed
from arbllm.nn import BinaryLinear
from tests.tiny import VOCABULARY, pack_tiny

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack_tiny(tmp_path_factory.mktemp("peft"))


def config(**changes) -> LoraConfig:
    return for_packed(LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **changes))


def windows() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


def adapted(packed) -> PeftModel:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return get_peft_model(arbllm.load(packed), config())


def learn(model: PeftModel, steps: int) -> list[float]:
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=windows(), labels=windows()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_adapters_learn_and_nothing_else(packed):
    model = adapted(packed)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        f"base_model.model.model.layers.{block}.{name}.lora_{letter}.default.weight"
        for block in range(2)
        for name in ("self_attn.q_proj", "mlp.down_proj")
        for letter in "AB"
    }
    losses = learn(model, steps=20)
    assert losses[-1] < losses[0] - 0.3
    untouched = arbllm.load(packed).state_dict()
    state = {name.replace(".base_layer", ""): tensor for name, tensor in model.get_base_model().state_dict().items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in untouched.items())


def test_what_an_adapted_linear_computes(packed):
    layer = adapted(packed).get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert isinstance(layer, PackedLora)
    assert isinstance(layer.base_layer, BinaryLinear)
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(second)
    x = torch.randn(20, 32)
    expected = layer.base_layer(x) + x @ first.T @ second.T * layer.scaling["default"]
    torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
def test_saved_adapters_are_loaded_again(packed, tmp_path):
    model = adapted(packed)
    with torch.enable_grad():
        learn(model, steps=3)
    model.save_pretrained(tmp_path)
    again = for_packed(LoraConfig.from_pretrained(tmp_path))
    loaded = PeftModel.from_pretrained(arbllm.load(packed), tmp_path, config=again)
    assert torch.equal(loaded(windows()).logits, model(windows()).logits)
    assert not torch.equal(loaded(windows()).logits, arbllm.load(packed)(windows()).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": "all-linear"}, "leaves out packed linears"),
        ({"use_dora": True}, "use_dora needs the weight"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' needs the weight"),
    ],
)
def test_options_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        for_packed(LoraConfig(**{"target_modules": TARGETS, **changes}))


def test_other_adapters_are_refused():
    with pytest.raises(ConfigError, match="IA3Config: beside packed linears there is LoRA alone"):
        for_packed(IA3Config(target_modules=TARGETS, feedforward_modules=[]))


def test_the_model_beneath_is_not_saved_with_adapters_in_it(packed, tmp_path):
    model = adapted(packed)
    with pytest.raises(ConfigError, match=r"q_proj\.base_layer has adapters beside it"):
        model.get_base_model().save_pretrained(tmp_path)
    model.unload().save_pretrained(tmp_path)
    assert torch.equal(arbllm.load(tmp_path)(windows()).logits, arbllm.load(packed)(windows()).logits)


def test_several_adapters_in_a_batch(packed):
    model = adapted(packed)
    model.add_adapter("other", config())
    learn(model, steps=2)
    model.eval()
    mixed = model(input_ids=windows(), adapter_names=["default", "other"]).logits
    torch.testing.assert_close(mixed[:1], model(input_ids=windows()[:1]).logits)


def test_adapters_are_not_merged_into_bits(packed):
    with pytest.raises(ConfigError, match=r"cannot be merged into packed weights.*arbllm export"):
        adapted(packed).merge_and_unload()


def test_adapters_are_merged_into_the_exported_model(packed, tmp_path):
    model = adapted(packed)
    learn(model, steps=3)
    model.save_pretrained(tmp_path / "adapters")
    export(packed, tmp_path / "dense", dtype="float32")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    merged = PeftModel.from_pretrained(dense, tmp_path / "adapters").merge_and_unload()
    torch.testing.assert_close(merged(windows()).logits, model(windows()).logits, rtol=1e-3, atol=1e-3)


def test_transformers_trains_adapters(packed, tmp_path):
    model = adapted(packed)
    options = TrainingArguments(
        tmp_path, max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    examples = [{"input_ids": window, "labels": window} for window in windows()]
    assert Trainer(model, options, train_dataset=examples).train().global_step == 2


def test_a_layer_says_where_it_computes(packed):
    layer = arbllm.load(packed).model.layers[0].self_attn.q_proj
    for _ in range(2):
        assert layer.qweight.device == torch.device("cpu")
        assert layer.qweight.numel() == 0
        layer(torch.randn(1, 32))
    assert layer.to("meta").qweight.is_meta
