import json
from dataclasses import replace

import pytest
import torch

from arbllm.errors import CheckpointError
from arbllm.format.layout import Layout, Place, Segment, packed_bytes

LAYOUT = Layout(
    rows=6, columns=40, segments=(Segment(17, 2, 1), Segment(20, 1, 1), Segment(3, 4, 2)), ordering="segments",
    block_size=0, scale_bits=16, row_means=True, column_scaled=True,
)  # fmt: skip


def test_round_trips_through_json():
    values = json.loads(json.dumps(LAYOUT.to_dict()))
    assert Layout.from_dict(values) == LAYOUT
    assert values == LAYOUT.to_dict()
    assert values["segments"] == [[17, 2, 1, False], [20, 1, 1, False], [3, 4, 2, False]]


def test_sizes_follow_from_the_segments():
    assert LAYOUT.weights == 240
    assert LAYOUT.salient == 3
    assert (LAYOUT.grouped_columns, LAYOUT.quartered_columns) == (20, 3)
    assert (LAYOUT.row_scale_slots, LAYOUT.row_mean_slots) == (2 + 1 + 8, 2 + 1 + 4)
    assert LAYOUT.column_scale_slots == 2 * 17 + 20 + 8 * 3
    assert LAYOUT.segment_planes == 2
    bare = replace(LAYOUT, row_means=False, column_scaled=False)
    assert (bare.row_mean_slots, bare.column_scale_slots) == (0, 0)
    assert [segment.bits for segment in LAYOUT.segments] == [2, 1, 4]


def test_places_count_what_comes_before():
    assert LAYOUT.places == (
        Place(LAYOUT.segments[0], 0, 0, 0, 0, 0, 0, 0, 0, 0),
        Place(LAYOUT.segments[1], 17, 2, 2, 34, 17, 0, 0, 0, 0),
        Place(LAYOUT.segments[2], 37, 3, 3, 54, 17, 0, 0, 0, 0),
    )
    twice = replace(LAYOUT, columns=80, segments=LAYOUT.segments * 2)
    assert twice.places[5] == Place(LAYOUT.segments[2], 77, 14, 10, 78 + 54, 37, 3, 3, 0, 0)


def test_every_part_has_its_tensor():
    assert LAYOUT.tensors() == {
        "signs": (torch.uint8, (6, 5)),
        "group_bitmap": (torch.uint8, (6, 3)),
        "group_bitmap_high": (torch.uint8, (6, 1)),
        "second_signs": (torch.uint8, (6, 1)),
        "row_scales": (torch.float16, (6, 11)),
        "row_means": (torch.float16, (6, 7)),
        "column_scales": (torch.float16, (78,)),
        "column_segments": (torch.uint8, (2, 5)),
    }
    codes = replace(LAYOUT, scale_bits=8, row_means=False).tensors()
    assert codes["row_scales"] == (torch.uint8, (6, 11))
    assert codes["column_scales"] == (torch.uint8, (78,))
    assert codes["scale_steps"] == (torch.float16, (11,))
    assert "row_means" not in codes


def test_absent_parts_have_none():
    plain = replace(LAYOUT, segments=(Segment(40, 1, 1),), ordering="natural", row_means=False, column_scaled=False)
    assert list(plain.tensors()) == ["signs", "row_scales"]


@pytest.mark.parametrize(
    ("ordering", "columns", "name", "dtype", "shape"),
    [
        ("bitmap", 40, "column_bitmap", torch.uint8, (5,)),
        ("explicit", 32767, "column_order", torch.int16, (32767,)),
        ("explicit", 32768, "column_order", torch.int32, (32768,)),
    ],
)
def test_an_order_has_its_tensor(ordering, columns, name, dtype, shape):
    layout = replace(LAYOUT, columns=columns, segments=(Segment(columns, 1, 1),), ordering=ordering)
    assert layout.tensors()[name] == (dtype, shape)


@pytest.mark.parametrize(("bits", "size"), [(0, 0), (1, 1), (8, 1), (9, 2), (64, 8)])
def test_packed_bytes(bits, size):
    assert packed_bytes(bits) == size


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rows", 0),
        ("rows", True),
        ("columns", -1),
        ("columns", 41),
        ("columns", 40.0),
        ("segments", None),
        ("segments", 40),
        ("segments", []),
        ("segments", [40, 1, 1, False]),
        ("segments", [[20, 1, 1], [20, 1, 1]]),
        ("segments", [[20, 1, 1, False, 0], [20, 1, 1, False, 0]]),
        ("segments", [[39, 1, 1, False], [2, 1, 1, False]]),
        ("segments", [[40, 1, 1, False], [0, 1, 1, False]]),
        ("segments", [[41, 1, 1, False], [-1, 1, 1, False]]),
        ("segments", [[20, 3, 1, False], [20, 1, 1, False]]),
        ("segments", [[20, 1, 3, False], [20, 1, 1, False]]),
        ("segments", [[20.0, 1, 1, False], [20, 1, 1, False]]),
        ("segments", [[20, True, 1, False], [20, 1, 1, False]]),
        ("segments", [["20", 1, 1, False], [20, 1, 1, False]]),
        ("segments", [[40, 1, 1, False]]),
        ("ordering", "random"),
        ("ordering", None),
        ("ordering", []),
        ("ordering", "bitmap"),
        ("block_size", 8),
        ("block_size", -1),
        ("block_size", False),
        ("scale_bits", 4),
        ("scale_bits", 16.0),
        ("row_means", 1),
        ("column_scaled", None),
    ],
)
def test_impossible_sizes_are_named(field, value):
    with pytest.raises(CheckpointError, match=r"model\.q_proj: "):
        Layout.from_dict({**LAYOUT.to_dict(), field: value}, "model.q_proj")


def test_missing_and_unknown_fields_are_named():
    values = LAYOUT.to_dict()
    with pytest.raises(CheckpointError, match=r"layer: its layout in config\.json is not readable.*'colour'"):
        Layout.from_dict({**values, "colour": 1}, "layer")
    for field in values:
        with pytest.raises(CheckpointError, match=rf"layer: .*{field}"):
            Layout.from_dict({key: value for key, value in values.items() if key != field}, "layer")
