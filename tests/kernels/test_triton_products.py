from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from arbllm.budget import joint_layout
from arbllm.format.layout import Layout, Segment
from arbllm.kernels.triton_configuration import load
from arbllm.kernels.triton_plan import plan_of

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
SHAPES = [(192, 576), (4096, 4096), (11008, 4096), (8192, 28672)]


def plan_and_products(rows, columns):
    from arbllm.kernels import triton_products

    return plan_of(joint_layout(rows, columns, 2.25, 512, columns // 500, True)), triton_products


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_few_tokens_are_divided_so_that_programs_run_side_by_side(shape, tokens):
    plan, products = plan_and_products(*shape)
    launch = load("any").few
    division = products.divide_few(plan, launch, tokens)
    assert division.size * division.blocks >= tokens
    assert division.rows * division.places >= plan.height > division.rows * (division.places - 1)
    assert division.rows <= launch.most_rows
    assert products.words_aside(launch, division.rows) * division.rows == launch.words * launch.rows
    assert division.most % products.words_aside(launch, division.rows) == 0
    programs = launch.programs // products.SHARES[division.size]
    if division.size <= products.FEWEST:
        assert len(plan.units(division.most, torch.device("cpu"))) * division.places <= 2 * programs


@pytest.mark.parametrize("tokens", [9, 64, 100, 256])
@pytest.mark.parametrize("shape", SHAPES)
def test_many_tokens_are_divided_among_all_programs(shape, tokens):
    plan, products = plan_and_products(*shape)
    division = products.divide_many(plan, load("any").many, tokens)
    assert division.size * division.blocks >= tokens > division.size * (division.blocks - 1)
    assert division.rows * division.places >= plan.height


def test_programs_have_the_rows_that_they_are_told_where_these_are_the_most():
    plan, products = plan_and_products(8192, 28672)
    launch = replace(load("any").few, rows=64, most_rows=64)
    assert products.divide_few(plan, launch, 1).rows == 64


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("widths", [(78, 50), (512, 512)], ids=["blocks of 128", "segments of 512"])
def test_inputs_made_ready_take_no_more_than_the_weights(widths, tokens):
    _, products = plan_and_products(192, 576)
    configuration = load("any")
    pair = (Segment(widths[0], 2, 1), Segment(widths[1], 1, 2))
    count = 28_672 // sum(widths)
    layout = Layout(8192, 28_672, pair * count, "explicit", 0, 16, row_means=False, column_scaled=True)
    plan = plan_of(layout)
    words = products.scratch_words(plan, configuration.few, tokens)
    few = products.kernel_for(plan, configuration, tokens) == "few"
    assert few == (8 * words <= 2 * layout.weights)
    assert few or tokens > 1
