"""Checkpoints whose group bitmaps are coded."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import arbllm
from arbllm.errors import CheckpointError
from arbllm.format.accounting import total_size
from arbllm.format.checkpoint import bytes_on_disk, file_metadata, open_checkpoint, verify
from arbllm.format.coding import coded_planes, encode
from arbllm.format.report import report
from arbllm.nn import BinaryLinear
from tests.helpers import pack_randomly
from tests.tiny import tiny_llama

CODED = pytest.mark.parametrize("coding", ["csr", "entropy"])
NAME = "model.layers.1.mlp.down_proj.group_bitmap"


@pytest.fixture(scope="module")
def model():
    return pack_randomly(tiny_llama())


def save(model, directory, coding, **options):
    model.hf_quantizer.quantization_config.bitmap = coding
    model.save_pretrained(directory, **options)
    return directory


def assert_same(found, expected):
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def replace(directory, tensor):
    """Put another tensor in the place of NAME, with a checksum that fits."""
    file = directory / "model.safetensors"
    tensors = load_file(file) | {NAME: tensor}
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    save_file(tensors, file, metadata={"format": "pt", **file_metadata(tensors, config["linears"])})


@CODED
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}])
def test_round_trip(model, coding, options, tmp_path):
    save(model, tmp_path / "first", coding, **options)
    verify(tmp_path / "first")
    loaded = arbllm.load(tmp_path / "first")
    assert_same(loaded, model)
    loaded.save_pretrained(tmp_path / "again", **options)
    assert open_checkpoint(tmp_path / "again").bitmap == coding
    assert open_checkpoint(tmp_path / "again").checksums == open_checkpoint(tmp_path / "first").checksums
    assert_same(arbllm.load(tmp_path / "again"), model)


def test_another_coding_may_be_asked_for(model, tmp_path):
    loaded = arbllm.load(save(model, tmp_path / "first", "entropy"))
    raw = save(loaded, tmp_path / "raw", "raw")
    assert open_checkpoint(raw).tensors[NAME].shape == model.state_dict()[NAME].shape
    assert_same(arbllm.load(raw), model)


@CODED
def test_sizes_are_those_of_the_file(model, coding, tmp_path):
    save(model, tmp_path, coding)
    found = report(tmp_path)
    layers = [module for module in model.modules() if isinstance(module, BinaryLinear)]
    coded = sum(
        len(encode(layer.get_buffer(plane), width, coding))
        for layer in layers
        for plane, width in coded_planes(layer.layout, coding).items()
    )
    memory = total_size(layer.layout for layer in layers)
    assert found.size.linears_in_memory == memory
    assert found.size.linears.group_bitmap == coded
    assert found.size.linears.nbytes == memory.nbytes - memory.group_bitmap + coded
    assert sum(linear.bytes for linear in found.linears) == found.size.linears.nbytes
    assert found.size.nbytes < bytes_on_disk(tmp_path) < found.size.nbytes + 60_000
    values = found.to_dict()
    assert values["bitmap"] == coding
    assert values["linear_bytes_in_memory"] == memory.nbytes
    assert values["true_bits_per_weight_in_memory"] == memory.true_bits != values["true_bits_per_weight"]


@CODED
def test_damage_is_refused(model, coding, tmp_path):
    save(model, tmp_path, coding)
    coded = load_file(tmp_path / "model.safetensors")[NAME]
    spoiled = coded.clone()
    spoiled[0] ^= 255
    replace(tmp_path, spoiled)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {NAME}: no bitmap as {coding} codes it"):
        arbllm.load(tmp_path)
    for tensor in (coded[:-1], coded[None], coded.to(torch.int8)):
        replace(tmp_path, tensor.clone())
        with pytest.raises(CheckpointError, match=rf"tensor {NAME} should be \[32, 64\] bits as {coding} codes them"):
            arbllm.load(tmp_path)


def test_an_unknown_coding_is_refused(model, tmp_path):
    file = save(model, tmp_path, "csr") / "config.json"
    file.write_text(file.read_text().replace('"bitmap": "csr"', '"bitmap": "zip"'))
    with pytest.raises(
        CheckpointError, match=r"config\.json: bitmap 'zip' is unknown; choose one of raw, csr, entropy"
    ):
        arbllm.load(tmp_path)


def test_the_wrong_coding_is_refused(model, tmp_path):
    file = save(model, tmp_path, "csr") / "config.json"
    text = file.read_text()
    for other in ("raw", "entropy"):
        file.write_text(text.replace('"bitmap": "csr"', f'"bitmap": "{other}"'))
        with pytest.raises(CheckpointError, match="group_bitmap"):
            arbllm.load(tmp_path)
