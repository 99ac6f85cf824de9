import json
from dataclasses import replace

import pytest

from arbllm.errors import CheckpointError
from arbllm.format.layout import Layout, packed_bytes

LAYOUT = Layout(
    rows=6, columns=20, block_size=8, groups=2, salient_groups=2, salient=3, row_scale_slots=14, row_mean_slots=0,
    column_scaled=True,
)  # fmt: skip


def test_round_trips_through_json():
    assert Layout.from_dict(json.loads(json.dumps(LAYOUT.to_dict()))) == LAYOUT
    assert LAYOUT.blocks == 3
    assert LAYOUT.weights == 120


@pytest.mark.parametrize(("bits", "size"), [(0, 0), (1, 1), (8, 1), (9, 2), (64, 8)])
def test_packed_bytes(bits, size):
    assert packed_bytes(bits) == size


@pytest.mark.parametrize(
    ("groups", "salient_groups", "salient", "planes"),
    [(1, 1, 3, 0), (1, 4, 0, 0), (1, 2, 3, 1), (2, 1, 0, 1), (2, 4, 3, 2), (4, 1, 3, 2)],
)
def test_bit_planes_hold_the_greater_number_of_groups(groups, salient_groups, salient, planes):
    layout = replace(LAYOUT, groups=groups, salient_groups=salient_groups, salient=salient)
    assert layout.bitmap_planes == planes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rows", 0),
        ("columns", -1),
        ("block_size", 1.5),
        ("block_size", True),
        ("row_scale_slots", 0),
        ("row_scale_slots", 19),
        ("row_mean_slots", 19),
        ("row_mean_slots", -1),
        ("row_mean_slots", None),
        ("groups", 3),
        ("salient_groups", 8),
        ("salient", 21),
        ("salient", -1),
        ("column_scaled", 1),
    ],
)
def test_impossible_sizes_are_named(field, value):
    with pytest.raises(CheckpointError, match=r"model\.q_proj: "):
        Layout.from_dict({**LAYOUT.to_dict(), field: value}, "model.q_proj")


def test_missing_and_unknown_fields_are_named():
    values = LAYOUT.to_dict()
    with pytest.raises(CheckpointError, match=r"layer: its layout in config\.json is not readable.*'colour'"):
        Layout.from_dict({**values, "colour": 1}, "layer")
    del values["salient"]
    with pytest.raises(CheckpointError, match=r"layer: .*'salient'"):
        Layout.from_dict(values, "layer")
