import json

from arbllm.cli.inspect import columns_by_bits
from arbllm.format.layout import Layout, Segment
from arbllm.format.report import report
from arbllm.nn import BinaryLinear
from tests.helpers import pack_randomly, random_packed
from tests.tiny import tiny_llama

NAME = "model.layers.0.mlp.up_proj"


def test_columns_of_a_kind_are_counted_together(tmp_path):
    kinds = (3, 1, 1), (8, 2, 1), (2, 1, 3, True), (4, 2, 2), (3, 4, 1), (6, 2, 1), (3, 1, 1), (3, 1, 3, True)
    layout = Layout(
        rows=64, columns=32, segments=tuple(Segment(*kind) for kind in kinds), ordering="segments", block_size=0,
        scale_bits=8, row_means=False, column_scaled=True,
    )  # fmt: skip
    model = pack_randomly(tiny_llama())
    model.set_submodule(NAME, BinaryLinear.from_matrix(random_packed(layout)))
    model.save_pretrained(tmp_path)
    found = report(tmp_path)
    (linear,) = [linear for linear in found.linears if linear.name == NAME]
    assert linear.kinds == (
        Segment(5, 1, 3, True),
        Segment(4, 2, 2),
        Segment(3, 4, 1),
        Segment(14, 2, 1),
        Segment(6, 1, 1),
    )
    assert columns_by_bits(linear) == "12x3b 14x2b 6x1b"
    values = json.loads(json.dumps(found.to_dict()))
    assert [v["kinds"] for v in values["linears"] if v["name"] == NAME] == [[list(kind) for kind in linear.kinds]]
    assert values["linear_bytes_by_part"]["column_order"] == 3 * 4
