from dataclasses import replace

import pytest
import torch
from hypothesis import given

from arbllm.format.accounting import StorageSize, matrix_size, model_size, total_size
from arbllm.format.layout import Layout, Segment
from tests.helpers import random_matrix
from tests.strategies import matrices


@given(matrix=matrices())
def test_size_is_that_of_the_tensors(matrix):
    size = matrix_size(matrix.layout)
    assert size.nbytes == matrix.nbytes
    assert size.true_bits == matrix.true_bits
    assert size.nominal_bits == pytest.approx(matrix.nominal_bits)
    assert sum(size.bits_per_weight.values()) == pytest.approx(size.true_bits)


SEGMENTS = Segment(24, 4, 1), Segment(6, 1, 1), Segment(10, 2, 2)
EVERYTHING = Layout(
    rows=6, columns=40, segments=SEGMENTS, ordering="segments", block_size=0, scale_bits=16, row_means=True,
    column_scaled=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({}, {"column_order": 2 * 5}),
        ({"scale_bits": 8}, {"row_scales": 6 * 9 + 2 * 9, "column_scales": 4 * 24 + 6 + 4 * 10, "column_order": 2 * 5}),
        ({"ordering": "bitmap"}, {"column_bitmap": 5}),
        ({"ordering": "explicit"}, {"column_order": 2 * 40}),
        ({"ordering": "natural"}, {}),
        (
            {"segments": (*SEGMENTS[:2], Segment(10, 1, 4, True)), "row_means": False},
            {
                "group_bitmap": 2 * 6 * 3,
                "second_signs": 3 * 6 * 2,
                "row_scales": 2 * 6 * (4 + 1 + 1),
                "row_means": 0,
                "column_scales": 2 * (4 * 24 + 6 + 10),
                "column_order": 2 * 5,
            },
        ),
        ({"ordering": "natural", "row_means": False, "column_scaled": False}, {"row_means": 0, "column_scales": 0}),
    ],
)
def test_parts_of_one_matrix(change, parts):
    assert matrix_size(replace(EVERYTHING, **change)).parts == {
        "signs": 6 * 5,
        "group_bitmap": 6 * 5 + 6 * 3,
        "column_bitmap": 0,
        "column_order": 0,
        "second_signs": 6 * 2,
        "row_scales": 2 * 6 * (4 + 1 + 4),
        "row_means": 2 * 6 * (4 + 1 + 2),
        "column_scales": 2 * (4 * 24 + 6 + 4 * 10),
        **parts,
    }


def test_totals_weigh_matrices_by_their_weights():
    layouts = [random_matrix(8, 64, salient=4).layout, random_matrix(64, 640, salient=64).layout]
    total = total_size(layouts)
    assert total.weights == 8 * 64 + 64 * 640
    assert total.nbytes == sum(matrix_size(layout).nbytes for layout in layouts)
    assert total.nominal_bits == 1 + (8 * 4 + 64 * 64) / total.weights


def test_nothing_packed_has_no_bits():
    assert total_size([]) == StorageSize()
    assert total_size([]).true_bits == total_size([]).nominal_bits == 0


def test_dense_tensors_are_counted_apart():
    matrix = random_matrix(8, 64, salient=4)
    tensors = {f"proj.{name}": tensor for name, tensor in matrix.tensors().items()}
    tensors |= {"proj.bias": torch.zeros(8), "embed.weight": torch.zeros(10, 64).half(), "norm.weight": torch.zeros(64)}
    size = model_size({"proj": matrix.layout}, {name: (tuple(t.shape), t.nbytes) for name, t in tensors.items()})
    assert size.linears.nbytes == matrix.nbytes
    assert size.embeddings == 2 * 10 * 64
    assert size.rest == 4 * (8 + 64)
    assert size.nbytes == sum(tensor.nbytes for tensor in tensors.values())
