import json

import pytest
import torch

from arbllm.config import BinarizationConfig
from arbllm.errors import ConfigError, ModelError
from arbllm.evaluation.analyze import analyze_model, by_kind_and_depth, compare_methods, most_columnar, variance_shares
from arbllm.evaluation.write_analysis import FIGURES, PAGE, PICTURE, write_analysis
from arbllm.model.capture import capture_inputs, gather_hessians, propagate
from arbllm.model.walk import find_blocks
from arbllm.solver import quantize_matrix
from tests.model.tiny_models import random_windows, tiny_model
from tests.tiny import tiny_llama


def signs(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(2, (rows, columns), generator=torch.Generator().manual_seed(0)) * 2.0 - 1


def test_scales_alone_are_found_as_what_they_are():
    column, row = torch.rand(1, 40) + 0.1, torch.rand(30, 1) + 0.1
    by_column = variance_shares(signs(30, 40) * column)
    assert (by_column.columns, by_column.rows, by_column.jointly) == pytest.approx((1, 0, 1), abs=1e-9)
    by_row = variance_shares(signs(30, 40) * row)
    assert (by_row.columns, by_row.rows, by_row.jointly) == pytest.approx((0, 1, 1), abs=1e-9)
    both = variance_shares(signs(30, 40) * row * column)
    assert both.jointly == pytest.approx(1, abs=1e-9)
    assert both.columns + both.rows < 1


def test_equal_distribution_shows_what_chance_would():
    shares = variance_shares(torch.randn(300, 500, generator=torch.Generator().manual_seed(0)))
    assert shares.columns == pytest.approx(shares.columns_by_chance, rel=0.2)
    assert shares.rows == pytest.approx(shares.rows_by_chance, rel=0.2)
    assert (shares.columns_by_chance, shares.rows_by_chance) == pytest.approx((1 / 300, 1 / 500), rel=0.01)


def test_shares_by_the_definition():
    values = torch.randn(6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    size = values.abs()
    shares = variance_shares(values)
    total = size.var(correction=0)
    assert shares.columns == pytest.approx(float(size.mean(0).var(correction=0) / total))
    assert shares.rows == pytest.approx(float(size.mean(1).var(correction=0) / total))
    left = torch.linalg.svdvals(size)[1:].square().sum() / (54 * total)
    assert shares.jointly == pytest.approx(float(1 - left), abs=1e-9)


def test_a_constant_matrix_has_no_variance():
    assert variance_shares(torch.ones(3, 4)).jointly == 0.0


def test_a_model_by_kind_and_depth():
    model = tiny_model("llama")
    up = model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        up.weight.mul_(torch.linspace(0.1, 3, 32))
    linears = analyze_model(model)
    assert most_columnar(linears).name == "model.layers.1.mlp.up_proj"
    table = by_kind_and_depth(linears)
    assert list(table) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert table["up_proj"]["middle third"] == variance_shares(up.weight)
    thirds = [table["up_proj"][depth].columns for depth in ("first third", "middle third", "last third")]
    assert table["up_proj"]["all"].columns == pytest.approx(sum(thirds) / 3)


def test_methods_are_calibrated_on_what_the_dense_model_passes():
    model, windows = tiny_model("llama"), random_windows()
    name = "model.layers.1.mlp.down_proj"
    weight, remainders = compare_methods(model, name, windows, ["billm", "arb-rc"])
    blocks = find_blocks(model)
    hidden, calls = capture_inputs(model, blocks, windows, torch.device("cpu"))
    propagate(blocks[0], calls[0], hidden)
    hessian = next(
        group.hessian
        for group in gather_hessians(blocks[1], calls[1], hidden)
        if name in [linear.name for linear in group.linears]
    )
    for remainder in remainders:
        expected = quantize_matrix(weight, hessian, BinarizationConfig(remainder.method))
        assert torch.equal(remainder.weight, expected.dequantize())
        assert remainder.output_error == pytest.approx(expected.report.output_error, rel=1e-3)
        assert remainder.columns == variance_shares(weight - remainder.weight).columns
    with pytest.raises(ConfigError, match=r"no linear 'lm_head'.*layers.0.self_attn.q_proj"):
        compare_methods(model, "lm_head", windows)


def test_windows_longer_than_the_model_takes_are_refused():
    with pytest.raises(ModelError, match="choose --window-length 128 or less"):
        compare_methods(tiny_llama(), "model.layers.0.mlp.up_proj", torch.zeros(1, 129, dtype=torch.long))


def test_the_page(tmp_path):
    model = tiny_model("llama")
    linears = analyze_model(model)
    weight, remainders = compare_methods(model, linears[0].name, random_windows(), ["billm", "arb-rc"])
    text = write_analysis("tiny", linears, linears[0].name, "8 windows of text", weight, remainders, tmp_path)
    assert (tmp_path / PAGE).read_text() == text
    assert (tmp_path / PICTURE).read_bytes()[:4] == b"\x89PNG"
    figures = json.loads((tmp_path / FIGURES).read_text())
    assert len(figures["linears"]) == 21
    assert f"explain {100 * figures['mean']['columns']:.1f} %" in text.replace("\n", " ")
    assert f"| arb-rc | {remainders[1].true_bits:.2f} |" in text
    assert "calibrated on 8 windows of text" in text
    assert figures["calibration"] == "8 windows of text"
