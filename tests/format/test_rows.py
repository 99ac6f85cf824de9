import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arbllm.errors import CheckpointError, ModelError
from arbllm.format import rows
from arbllm.format.rows import RowLayout, dequantize_rows, quantize_rows, row_layouts

TINIEST = 127 * 2.0**-25  # of rows below, no float16 scale is left


@given(
    magnitude=st.floats(-12, 12).map(lambda exponent: 10.0**exponent),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_no_weight_is_off_by_more_than_half_a_scale(magnitude, dtype, seed):
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed)) * min(magnitude, 1e6)
    if dtype == torch.float16:
        weight = weight.clamp(-65504, 65504)
    weight = weight.to(dtype)
    codes, scales = quantize_rows(weight)
    assert (codes.dtype, scales.dtype, codes.shape, scales.shape) == (torch.int8, torch.float16, (5, 9), (5,))
    error = (dequantize_rows(codes, scales) - weight.float()).abs().amax(1)
    assert (error <= (scales.float() / 2 * (1 + 1e-5)).clamp(min=TINIEST)).all()
    # The scale is no larger than it must be: float16 holds it to 11 bits, or to a step of 2^-24 among tiny ones.
    exact = weight.float().abs().amax(1) / 127
    assert (scales.float() <= (exact * (1 + 2.0**-11)).maximum(exact + 2.0**-24)).all()


def test_the_whole_range_of_codes_is_used():
    codes, scales = quantize_rows(torch.tensor([[1.0, -1.0, 0.25, 0.0], [-3.0, 0.0, 3.0, 1.0]]))
    assert codes.tolist() == [[127, -127, 32, 0], [-127, 0, 127, 42]]
    assert scales.tolist() == pytest.approx([1 / 127, 3 / 127], rel=2**-11)


def test_rows_of_zeros():
    codes, scales = quantize_rows(torch.zeros(2, 4))
    assert not codes.any()
    assert not dequantize_rows(codes, scales).any()


def test_a_large_matrix_is_rounded_piece_by_piece(monkeypatch):
    weight = torch.randn(50, 8)
    whole = quantize_rows(weight)
    monkeypatch.setattr(rows, "ROWS_AT_ONCE", 7)
    assert all(map(torch.equal, quantize_rows(weight), whole))


@pytest.mark.parametrize("entry", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_what_no_scale_reaches_is_refused(entry):
    weight = torch.ones(3, 4)
    weight[1, 2] = entry
    with pytest.raises(ModelError, match="NaN, infinite or huge"):
        quantize_rows(weight)


def test_layouts_through_json():
    layout = RowLayout(10, 4)
    assert row_layouts({"embeddings": {"embed": layout.to_dict()}}) == {"embed": layout}
    assert (layout.weights, layout.nbytes) == (40, 40 + 2 * 10)
    assert row_layouts({}) == {}


@pytest.mark.parametrize("changes", [{"bits": 4}, {"rows": 0}, {"rows": "10"}, {"columns": None}, {"more": 1}])
def test_an_unknown_description_is_refused(changes):
    with pytest.raises(CheckpointError, match="the embedding embed is not described"):
        row_layouts({"embeddings": {"embed": {**RowLayout(10, 4).to_dict(), **changes}}})
    with pytest.raises(CheckpointError, match="the embedding embed"):
        row_layouts({"embeddings": {"embed": None}})
