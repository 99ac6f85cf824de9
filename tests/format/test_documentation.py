"""docs/format.md is run as it stands: its programs read what arbllm writes, with nothing of arbllm's but the bytes."""

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.numpy import load_file

from arbllm.format.checkpoint import CHECKSUMS_KEY, EMBEDDINGS_KEY, LINEARS_KEY
from arbllm.format.coding import coded_planes, encode
from arbllm.integrations.dense import dense_model
from arbllm.model.embeddings import quantize_embeddings
from tests.helpers import pack_randomly
from tests.strategies import matrices
from tests.tiny import tiny_llama

DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"
RTOL, ATOL = 2e-6, 1e-6


@cache
def programs():
    """The names that the document's programs define; running them checks the worked example."""
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    names: dict = {}
    exec("\n".join(blocks), names)
    return names


@given(matrix=matrices())
def test_any_matrix_reads_as_documented(matrix):
    names = programs()
    tensors = {name: tensor.numpy() for name, tensor in matrix.tensors().items()}
    layout = matrix.layout.to_dict()
    order = matrix.column_order()
    natural = list(range(layout["columns"]))
    assert names["stored_order"](layout, tensors) == (natural if order is None else order.tolist())
    np.testing.assert_allclose(
        matrix.dequantize().numpy(), names["dense_weight"](layout, tensors), rtol=RTOL, atol=ATOL
    )


@pytest.mark.parametrize("coding", ["csr", "entropy"])
@settings(max_examples=25)
@given(matrix=matrices())
def test_coded_bitmaps_read_as_documented(coding, matrix):
    for name, width in coded_planes(matrix.layout, coding).items():
        plane = matrix.tensors()[name]
        decoded = programs()[f"decode_{coding}"](encode(plane, width, coding).numpy(), len(plane), width)
        np.testing.assert_array_equal(decoded, plane.numpy())


def test_embeddings_in_8_bits_read_as_documented(tmp_path):
    documented = programs()
    model = tiny_llama()
    quantize_embeddings(model)
    pack_randomly(model).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embeddings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["embeddings"]
    with safe_open(file, framework="numpy") as reader:
        assert reader.metadata()[EMBEDDINGS_KEY] == documented["linears_checksum"](embeddings)
    found = {name: documented["dense_rows"](tensors[f"{name}.codes"], tensors[f"{name}.scales"]) for name in embeddings}
    dense_model(model)
    assert found.keys() == {"model.embed_tokens", "lm_head"}
    for name, weight in found.items():
        np.testing.assert_array_equal(model.get_submodule(name).weight.detach().numpy(), weight)


def test_a_checkpoint_reads_as_documented(tmp_path):
    documented = programs()
    model = pack_randomly(tiny_llama())
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    linears = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["linears"]
    for module, layout in linears.items():
        parts = {name.removeprefix(f"{module}."): tensor for name, tensor in tensors.items() if name.startswith(module)}
        expected = model.get_submodule(module).matrix.dequantize().numpy()
        np.testing.assert_allclose(documented["dense_weight"](layout, parts), expected, rtol=RTOL, atol=ATOL)
    with safe_open(file, framework="numpy") as reader:
        metadata = reader.metadata()
    assert json.loads(metadata[CHECKSUMS_KEY]) == {
        name: documented["checksum"](array) for name, array in tensors.items()
    }
    assert metadata[LINEARS_KEY] == documented["linears_checksum"](linears)
