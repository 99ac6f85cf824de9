"""docs/format.md is run as it stands: its programs read what arbllm writes, with nothing of arbllm's but the bytes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from arbllm.format.checkpoint import CHECKSUMS_KEY, LINEARS_KEY
from tests.helpers import pack_randomly, random_matrix
from tests.tiny import tiny_llama

DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"


@pytest.fixture(scope="module")
def documented():
    """The names that the document's programs define; running them checks the worked example."""
    programs = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    names: dict = {}
    exec("\n".join(programs), names)
    return names


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("salient_groups", [1, 2, 4])
@pytest.mark.parametrize("salient", [0, 9, 45])
@pytest.mark.parametrize(("row_means", "column_scaled"), [(True, False), (False, True), (True, True)])
def test_any_matrix_reads_as_documented(documented, groups, salient_groups, salient, row_means, column_scaled):
    matrix = random_matrix(
        7, 45, groups=groups, salient_groups=salient_groups, salient=salient, block_size=12,
        row_means=row_means, column_scaled=column_scaled, seed=salient,
    )  # fmt: skip
    tensors = {name: tensor.numpy() for name, tensor in matrix.tensors().items()}
    expected = documented["dense_weight"](matrix.layout.to_dict(), tensors)
    np.testing.assert_allclose(matrix.dequantize().numpy(), expected, rtol=1e-6, atol=1e-7)


def test_a_checkpoint_reads_as_documented(documented, tmp_path):
    model = pack_randomly(tiny_llama())
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    linears = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["linears"]
    for module, layout in linears.items():
        parts = {name.removeprefix(f"{module}."): tensor for name, tensor in tensors.items() if name.startswith(module)}
        expected = model.get_submodule(module).matrix.dequantize().numpy()
        np.testing.assert_allclose(documented["dense_weight"](layout, parts), expected, rtol=1e-6, atol=1e-7)
    with safe_open(file, framework="numpy") as reader:
        metadata = reader.metadata()
    assert json.loads(metadata[CHECKSUMS_KEY]) == {
        name: documented["checksum"](array) for name, array in tensors.items()
    }
    assert metadata[LINEARS_KEY] == documented["linears_checksum"](linears)
