import pytest
import torch
from hypothesis import given

from arbllm.format import decode
from arbllm.format.decode import Decoder
from arbllm.format.layout import Layout, Segment
from tests.helpers import in_segments
from tests.strategies import matrices


@given(matrix=matrices())
def test_columns_may_be_decoded_in_runs_or_together(matrix):
    decoded = []
    for most in (0, 100):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode, "MOST_RUNS", most)
            decoded.append(Decoder(matrix.layout, matrix.tensors()).rows(slice(0, matrix.layout.rows)))
    assert torch.equal(*decoded)


def test_one_row_by_hand():
    """Segments of two groups, then of two signs: mean + sign * row scale * column scale, by the document."""
    layout = Layout(
        rows=1, columns=3, segments=(Segment(2, 2, 1), Segment(1, 1, 2)), ordering="natural", block_size=0,
        scale_bits=16, row_means=True, column_scaled=True,
    )  # fmt: skip
    tensors = {
        "signs": torch.tensor([[0b001]], dtype=torch.uint8),
        "group_bitmap": torch.tensor([[0b10]], dtype=torch.uint8),
        "second_signs": torch.tensor([[0b1]], dtype=torch.uint8),
        "row_scales": torch.tensor([[1.0, 2.0, 4.0, 8.0]]).half(),
        "row_means": torch.tensor([[0.25, 0.5, 1.0]]).half(),
        "column_scales": torch.tensor([3.0, 9.0, 9.0, 5.0, 1.0, 0.5]).half(),
    }
    expected = [0.25 + 1 * 3, 0.5 - 2 * 5, 1.0 - 4 * 1 + 8 * 0.5]
    assert Decoder(layout, tensors).rows(slice(None)).tolist() == [expected]


@pytest.mark.parametrize("further", [(), (Segment(8, 1, 2, True), Segment(3, 1, 4, True))])
def test_any_rows(further):
    matrix = in_segments(49, Segment(20, 4, 2), Segment(10, 1, 1), *further, ordering="explicit", scale_bits=8)
    decoder = Decoder(matrix.layout, matrix.tensors())
    for rows in (slice(3, 7), slice(41, 49)):
        assert torch.equal(decoder.rows(rows), decoder.rows(slice(0, 49))[rows])
