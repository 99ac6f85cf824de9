import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

import arbllm
from arbllm.errors import CheckpointError, ConfigError
from arbllm.format.checkpoint import bytes_on_disk, file_metadata, open_checkpoint, verify
from arbllm.integrations.load import load
from arbllm.integrations.transformers import ArbllmConfig, mark_packed, packed_linears
from arbllm.nn import BinaryLinear
from tests.helpers import pack_randomly
from tests.tiny import tiny_llama

TOKENS = torch.arange(24).reshape(2, 12)
MATCHING = {"rtol": 1e-5, "atol": 1e-5}


def from_pretrained(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options)


@pytest.fixture(scope="module")
def model():
    return pack_randomly(tiny_llama())


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("packed")
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def spoiled(model, tmp_path):
    """A checkpoint of its own for a test to damage."""
    model.save_pretrained(tmp_path)
    return tmp_path


def assert_same(found, expected):
    """Every tensor is bit for bit the same, and of the same dtype."""
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def data(file: Path) -> bytes:
    """What follows the header, in which safetensors orders the metadata by chance."""
    octets = file.read_bytes()
    return octets[8 + int.from_bytes(octets[:8], "little") :]


def flip_last_byte(directory: Path, name: str) -> None:
    stored = open_checkpoint(directory).tensors[name]
    octets = bytearray(stored.file.read_bytes())
    octets[stored.end - 1] ^= 1
    stored.file.write_bytes(octets)


def dense_twin(model):
    """The same model with dequantized weights in ordinary linears."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, BinaryLinear):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = module.matrix.dequantize()
            twin.set_submodule(name, linear)
    return twin


@pytest.mark.parametrize("reader", [load, from_pretrained])
def test_round_trip_is_bit_exact(model, saved, reader, tmp_path):
    loaded = reader(saved)
    assert_same(loaded, model)
    assert not loaded.training
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=0)
    loaded.save_pretrained(tmp_path)
    assert data(tmp_path / "model.safetensors") == data(saved / "model.safetensors")
    assert open_checkpoint(tmp_path).checksums == open_checkpoint(saved).checksums
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((saved / "config.json").read_text())
    assert_same(reader(tmp_path), model)


def test_logits_are_those_of_the_dequantized_model(saved):
    loaded = load(saved)
    torch.testing.assert_close(loaded(TOKENS).logits, dense_twin(loaded)(TOKENS).logits, **MATCHING)


def test_generates(saved):
    loaded = load(saved)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(TOKENS, **options), dense_twin(loaded).generate(TOKENS, **options))


def test_config_tells_what_was_done(model, saved):
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "arbllm"
    assert config["format_version"] == 3
    assert config["arbllm_version"] == arbllm.__version__
    assert config["binarization"]["method"] == "arb-rcx"
    assert config["linears"] == packed_linears(model)
    assert config["statistics"]["model.layers.0.mlp.up_proj"] == {"output_error": 0.1, "weight_error": 0.2}
    assert config["calibration"]["text"] == "random"
    assert "lm_head" not in config["linears"]


def test_bytes_on_disk_agree_with_accounting(tmp_path):
    big = pack_randomly(tiny_llama(hidden_size=256, intermediate_size=512, vocab_size=4096), salient=20, block_size=128)
    big.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.size.nbytes == len(data(tmp_path / "model.safetensors"))
    assert checkpoint.size.nbytes == pytest.approx(bytes_on_disk(tmp_path), rel=0.01)
    layers = [module for module in big.modules() if isinstance(module, BinaryLinear)]
    assert checkpoint.size.linears.nbytes == sum(layer.matrix.nbytes for layer in layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("reader", [load, from_pretrained])
def test_a_dtype_does_not_touch_packed_tensors(model, saved, dtype, reader):
    loaded = reader(saved, dtype=dtype)
    assert loaded.model.embed_tokens.weight.dtype == dtype
    for name, module in model.named_modules():
        if isinstance(module, BinaryLinear):
            assert_same(loaded.get_submodule(name), module)
    assert loaded(TOKENS).logits.dtype == dtype


def test_the_dtype_of_the_checkpoint_is_kept(tmp_path):
    pack_randomly(tiny_llama().to(torch.bfloat16)).save_pretrained(tmp_path)
    assert load(tmp_path).dtype == torch.bfloat16


def test_a_cast_model_saves_and_loads(saved, tmp_path):
    cast = load(saved).to(torch.bfloat16)
    cast.save_pretrained(tmp_path)
    assert_same(load(tmp_path), cast)


def test_a_device_can_be_named(model, saved):
    assert_same(load(saved, device="cpu"), model)
    assert_same(from_pretrained(saved, device_map="cpu"), model)


@pytest.mark.parametrize("shard_size", ["5KB", "20KB"])
def test_shards(model, shard_size, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    verify(tmp_path)
    for reader in (load, from_pretrained):
        assert_same(reader(tmp_path), model)


def test_tied_embeddings(tmp_path):
    tied = pack_randomly(tiny_llama(tie_word_embeddings=True))
    tied.save_pretrained(tmp_path)
    assert "lm_head.weight" not in open_checkpoint(tmp_path).tensors
    for reader in (load, from_pretrained):
        loaded = reader(tmp_path)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert_same(loaded, tied)


@pytest.mark.parametrize(
    "build",
    [
        lambda: GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=0, eos_token_id=0)
        ),
        lambda: OPTForCausalLM(
            OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
        ),
    ],
    ids=["transposed", "with bias"],
)
def test_biases_and_transposed_layers(build, tmp_path):
    torch.manual_seed(0)
    packed = pack_randomly(build().eval())
    packed.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_same(loaded, packed)
    assert packed_linears(loaded) == packed_linears(packed)
    assert all(options["bias"] for options in packed_linears(loaded).values())
    torch.testing.assert_close(loaded(TOKENS).logits, packed(TOKENS).logits)


def test_the_model_without_its_head(model, saved, tmp_path):
    headless = AutoModel.from_pretrained(saved)
    assert_same(headless, model.model)
    headless.save_pretrained(tmp_path)
    verify(tmp_path)
    assert_same(AutoModel.from_pretrained(tmp_path), model.model)
    with pytest.raises(CheckpointError, match=r"the model needs tensor lm_head\.weight"):
        load(tmp_path)


@pytest.mark.parametrize("reader", [load, from_pretrained])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.signs", "model.layers.0.self_attn.q_proj.row_scales", "model.norm.weight"]
)
def test_a_flipped_byte_is_refused(spoiled, reader, name):
    flip_last_byte(spoiled, name)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {name} does not match"):
        reader(spoiled)


def rewrite(directory: Path, change) -> None:
    """Change the tensors of a checkpoint behind the back of its checksums."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    metadata = file_metadata(
        tensors, json.loads((directory / "config.json").read_text())["quantization_config"]["linears"]
    )
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt", **metadata})


@pytest.mark.parametrize("reader", [load, from_pretrained])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.signs", "model.embed_tokens.weight"])
def test_a_missing_tensor_is_refused(spoiled, reader, name):
    rewrite(spoiled, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
        reader(spoiled)


@pytest.mark.parametrize("reader", [load, from_pretrained])
def test_a_misshapen_tensor_is_refused(spoiled, reader):
    name = "model.layers.1.mlp.down_proj.signs"

    def transpose(tensors):
        tensors[name] = tensors[name].T.contiguous()

    rewrite(spoiled, transpose)
    with pytest.raises(CheckpointError, match=rf"tensor {name} should be U8 \[32, 8\], but is U8 \[8, 32\]"):
        reader(spoiled)


@pytest.mark.parametrize("reader", [load, from_pretrained])
def test_a_version_from_the_future_is_refused(spoiled, reader):
    file = spoiled / "config.json"
    file.write_text(file.read_text().replace('"format_version": 3', '"format_version": 4'))
    with pytest.raises(CheckpointError, match="format version 4, this release of arbllm reads version 3"):
        reader(spoiled)


@pytest.mark.parametrize("reader", [load, from_pretrained])
def test_another_model_than_was_packed_is_refused(spoiled, reader):
    file = spoiled / "config.json"
    file.write_text(file.read_text().replace('"intermediate_size": 64', '"intermediate_size": 80'))
    with pytest.raises(
        CheckpointError,
        match=r"mlp\.\w+_proj is \[\d+, \d+\] in the model, but \[\d+, \d+\] as packed|config\.json: is not",
    ):
        reader(spoiled)


@pytest.mark.parametrize("reader", [load, from_pretrained])
def test_fewer_layers_than_were_packed_are_refused(spoiled, reader):
    file = spoiled / "config.json"
    file.write_text(file.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    missing = r"the packed linear model\.layers\.1\.\S+ is not in a LlamaForCausalLM"
    with pytest.raises(CheckpointError, match=rf"{missing}|config\.json: is not the one"):
        reader(spoiled)


def test_other_numbers_in_config_are_refused(spoiled):
    """Nothing else would tell: the tensors fit."""
    file = spoiled / "config.json"
    file.write_text(file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with pytest.raises(
        CheckpointError, match=r"config\.json: is not the one that .*model\.safetensors was written with"
    ):
        load(spoiled)


def test_a_config_without_a_dtype_is_refused(spoiled):
    """transformers would take that of any packed tensor for the dense ones."""
    file = spoiled / "config.json"
    values = json.loads(file.read_text())
    del values["dtype"]
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config\.json: names no dtype"):
        load(spoiled)


def test_numbers_that_may_be_changed_in_config(spoiled):
    file = spoiled / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"eos_token_id": 7, "use_cache": False, "transformers_version": "0"}))
    assert load(spoiled).config.eos_token_id == 7


def test_a_repository_of_the_hub_is_verified_too(model, saved, tmp_path):
    """Files that the hub's client has cached are found by the repository's id."""
    repository = tmp_path / "models--someone--packed"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(saved, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    options = {"cache_dir": tmp_path, "local_files_only": True}
    assert_same(from_pretrained("someone/packed", **options), model)
    flip_last_byte(snapshot, "model.norm.weight")
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight does not match"):
        from_pretrained("someone/packed", **options)


def test_the_config_of_a_repository_of_the_hub_is_verified_too(saved, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--packed" / "snapshots" / ("0" * 40)
    shutil.copytree(saved, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load("someone/packed")
    file = snapshot / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match=r"config\.json: is not the one that .* was written with"):
        load("someone/packed")


def test_truncated_and_missing_files_are_refused(spoiled):
    file = spoiled / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cut off before the end of tensor"):
        load(spoiled)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: missing"):
        load(spoiled)


def test_a_missing_shard_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    for reader in (load, from_pretrained):
        with pytest.raises(CheckpointError, match=r"model-00002-of-\d+\.safetensors: missing"):
            reader(tmp_path)


def test_tensors_that_transformers_did_not_load_are_refused(saved, monkeypatch):
    """Whatever transformers comes to do, a buffer that it left as it was is an error."""
    from transformers import core_model_loading

    original = core_model_loading.set_param_for_module

    def forgetful(model, target_name, *arguments, **options):
        if not target_name.endswith("q_proj.row_scales"):
            original(model, target_name, *arguments, **options)

    monkeypatch.setattr(core_model_loading, "set_param_for_module", forgetful)
    for reader in (load, from_pretrained):
        with pytest.raises(CheckpointError, match=r"q_proj\.row_scales did not reach the model"):
            reader(saved)


def test_what_is_not_a_packed_checkpoint(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="dense is not a packed checkpoint"):
        load(tmp_path / "dense")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        load(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="neither a directory here nor one that the hub gives"):
        load("./nowhere")


def test_a_hub_out_of_reach_is_not_asked_for_files(monkeypatch):
    asked = []

    def missing(path: str, **options: bool) -> None:
        asked.append(options["local_files_only"])
        raise OSError

    monkeypatch.setattr("arbllm.integrations.load.hub_is_reachable", lambda: False)
    monkeypatch.setattr(AutoConfig, "from_pretrained", missing)
    with pytest.raises(CheckpointError, match="nobody/nothing: neither a directory here"):
        load("nobody/nothing")
    assert asked == [True]


def test_what_is_wrong_with_the_device_is_not_blamed_on_the_checkpoint(saved):
    with pytest.raises(ConfigError, match="device 'cuda:99' is not known or not there"):
        load(saved, device="cuda:99")


def test_a_path_in_the_home_directory(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    assert load(f"~/{saved.name}").config.quantization_config


def test_a_dense_model_is_not_packed_by_naming_the_config(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        from_pretrained(tmp_path, quantization_config=ArbllmConfig())


def test_a_state_dict_without_files_cannot_be_verified(model, saved):
    config = AutoConfig.from_pretrained(saved)
    with pytest.raises(CheckpointError, match="pass their directory"):
        type(model).from_pretrained(None, config=config, state_dict=model.state_dict())


def test_mark_packed_takes_a_config_object(tmp_path):
    model = pack_randomly(tiny_llama())
    mark_packed(model, ArbllmConfig(binarization={"method": "billm"}))
    model.save_pretrained(tmp_path)
    assert load(tmp_path).config.quantization_config.binarization == {"method": "billm"}


def test_fields_of_later_releases_survive(spoiled, tmp_path_factory):
    file = spoiled / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["tuned"] = True
    file.write_text(json.dumps(config))
    again = tmp_path_factory.mktemp("again")
    load(spoiled).save_pretrained(again)
    assert json.loads((again / "config.json").read_text())["quantization_config"]["tuned"] is True
