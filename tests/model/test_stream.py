import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import arbllm
from arbllm.config import BinarizationConfig
from arbllm.errors import ConfigError, ModelError
from arbllm.model.quantize import quantize_model
from arbllm.model.source import open_model_only
from arbllm.model.stream import StreamedModel, can_stream
from arbllm.model.walk import find_blocks
from arbllm.nn import BinaryLinear
from tests.model.tiny_models import MIXTURES, tiny_model
from tests.tiny import save_tiny, save_tiny_mixture, tiny_llama

CONFIG = BinarizationConfig(iterations=1, allocation="uniform")


@pytest.fixture(scope="module", params=[{}, {"tie_word_embeddings": True}], ids=["head", "tied"])
def dense(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"), **request.param)


def on_meta(module):
    return [name for name, tensor in module.state_dict().items() if tensor.is_meta]


def test_blocks_come_when_asked_for(dense):
    streamed = StreamedModel(dense)
    first, second = find_blocks(streamed.model)
    tied = streamed.model.config.tie_word_embeddings
    outside = [name for name in on_meta(streamed.model) if ".layers." not in name]
    assert outside == ([] if tied else ["lm_head.weight"])
    assert len(on_meta(first.module)) == len(list(first.module.parameters()))
    streamed.load_block(second)
    assert on_meta(second.module) == []
    assert on_meta(first.module) != []
    streamed.load_block(first)
    streamed.load_head()
    whole = open_model_only(str(dense))
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in streamed.model.state_dict().items())
    ids = torch.arange(20)[None]
    assert torch.equal(streamed.model(ids).logits, whole(ids).logits)


def test_a_streamed_job_makes_the_same_checkpoint(dense, tmp_path):
    options = {"calibration": "builtin", "windows": 3, "window_length": 32, "device": "cpu", "tune": 2}
    arbllm.quantize(dense, tmp_path / "whole", config=CONFIG, **options)
    arbllm.quantize(dense, tmp_path / "streamed", config=CONFIG, stream=True, offload_dir=tmp_path / "spill", **options)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert list((tmp_path / "spill").iterdir()) == []


def test_dense_weights_are_gone_when_a_block_is_done(dense):
    streamed = StreamedModel(dense)
    waiting = []

    def load_block(block):
        rest = find_others(streamed.model, block.index)
        waiting.append([(index, any(on_meta(module))) for index, module in rest])
        streamed.load_block(block)

    quantize_model(streamed.model, torch.randint(200, (2, 16)), CONFIG, load_block=load_block, device="cpu")
    assert waiting[-1] == [(0, False)]
    assert waiting[0] == [(1, True)]
    linears = [module for module in streamed.model.modules() if isinstance(module, torch.nn.Linear)]
    assert linears == [streamed.model.lm_head]


@pytest.fixture(params=MIXTURES)
def mixture(request, tmp_path):
    """A mixture as its makers store it, expert by expert."""
    tiny_model(request.param).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_experts_are_put_together_as_transformers_does(mixture):
    streamed, whole = StreamedModel(mixture), open_model_only(str(mixture))
    for block in find_blocks(streamed.model):
        streamed.load_block(block)
    streamed.load_head()
    find_blocks(whole)
    state = streamed.model.state_dict()
    assert state.keys() == whole.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.state_dict().items())


def damaged_mixture(directory, change):
    """A Mixtral with something done to the tensors of its file; its second block is then read."""
    tiny_model("mixtral").save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors, "model.layers.1.block_sparse_moe.experts.2")
    save_file(tensors, directory / "model.safetensors")
    streamed = StreamedModel(directory)
    streamed.load_block(find_blocks(streamed.model)[1])


@pytest.mark.parametrize("experts", [3, 5])
def test_fused_experts_of_another_number(tmp_path, experts):
    tiny_model("gpt-oss").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[name] = torch.cat([tensors[name], tensors[name]])[:experts].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"layers\.1\.mlp\.experts\.down_proj: the files have {experts} of 4 experts"):
        StreamedModel(tmp_path)


def test_a_mixture_without_one_of_its_experts(tmp_path):
    def remove(tensors, expert):
        for letter in "123":
            del tensors[f"{expert}.w{letter}.weight"]

    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.\w+: the files have 3 of 4 experts"):
        damaged_mixture(tmp_path, remove)


def test_an_expert_of_another_shape(tmp_path):
    def replace(tensors, expert):
        tensors[f"{expert}.w1.weight"] = torch.zeros(3, 3)

    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: its parts do not go together"):
        damaged_mixture(tmp_path, replace)


def test_a_streamed_mixture_makes_the_same_checkpoint(tmp_path):
    dense = save_tiny_mixture(tmp_path / "dense")
    options = {"calibration": "builtin", "windows": 3, "window_length": 32, "device": "cpu", "tune": 2}
    arbllm.quantize(dense, tmp_path / "whole", config=CONFIG, **options)
    arbllm.quantize(dense, tmp_path / "streamed", config=CONFIG, stream=True, **options)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def find_others(model, index):
    return [(place, module) for place, module in enumerate(model.model.layers) if place != index]


def test_half_precision_is_kept(tmp_path):
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in StreamedModel(tmp_path).model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in StreamedModel(tmp_path, "float32").model.parameters()} == {torch.float32}


def test_a_changed_weight_changes_the_fingerprint(dense, tmp_path):
    before = StreamedModel(dense).fingerprint()
    for file in dense.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert StreamedModel(tmp_path).fingerprint() == before
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert StreamedModel(tmp_path).fingerprint() != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
            r"layers\.1\.mlp\.up_proj\.weight is not in",
        ),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}), r"model\.norm\.weight is \[31\]"),
    ],
)
def test_files_of_another_model_are_refused(dense, tmp_path, change, message):
    tensors = load_file(dense / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((dense / "config.json").read_bytes())
    with pytest.raises(ModelError, match=message):
        StreamedModel(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size=50_000)
    names = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    (tmp_path / max(names)).unlink()
    with pytest.raises(ModelError, match=f"{max(names)}: missing"):
        StreamedModel(tmp_path)


def test_a_weight_that_is_not_a_number_is_named(tmp_path):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    model.save_pretrained(tmp_path)
    streamed = StreamedModel(tmp_path)
    blocks = find_blocks(streamed.model)
    streamed.load_block(blocks[0])
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj"):
        streamed.load_block(blocks[1])


def test_what_cannot_be_streamed(dense, tmp_path):
    assert can_stream(str(dense))
    assert not can_stream("someone/model")
    with pytest.raises(ConfigError, match="local directory"):
        arbllm.quantize("someone/model", tmp_path / "out", stream=True)
    with pytest.raises(ConfigError, match="distill"):
        arbllm.quantize(dense, tmp_path / "out", stream=True, distill=3)
    model = StreamedModel(dense)
    with pytest.raises(ConfigError, match="uniform"):
        quantize_model(model.model, torch.zeros(1, 8, dtype=torch.long), load_block=model.load_block)
    with pytest.warns(UserWarning, match="divided uniformly"), pytest.raises(Exception, match="no such file"):
        arbllm.quantize(dense, tmp_path / "out", stream=True, calibration="no such file")
    assert not any(isinstance(module, BinaryLinear) for module in model.model.modules())
