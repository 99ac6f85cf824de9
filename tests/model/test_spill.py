import pytest
import torch

from arbllm.errors import ArbllmError, ConfigError
from arbllm.model.spill import spill


def test_the_copy_is_in_a_file_without_a_name(tmp_path):
    tensor = torch.randn(3, 4, 5)
    mapped = spill(tensor, tmp_path / "new")
    assert torch.equal(mapped, tensor)
    mapped[1] += 1
    assert not torch.equal(mapped, tensor)
    assert list((tmp_path / "new").iterdir()) == []


def test_where_it_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArbllmError, match="cannot be kept there"):
        spill(torch.zeros(2), tmp_path / "file")
    with pytest.raises(ConfigError, match="--device cpu"):
        spill(torch.zeros(2, device="meta"), tmp_path)
