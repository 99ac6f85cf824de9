import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from arbllm import segments as module
from arbllm.binarize import joint, trellis
from arbllm.binarize.trellis import TrellisPart
from arbllm.budget import KINDS, TRELLIS_KINDS, joint_layout
from arbllm.config import BinarizationConfig
from arbllm.factor import Factor, factorize
from arbllm.format.accounting import matrix_size
from arbllm.format.assemble import assemble
from arbllm.format.layout import Segment
from arbllm.segments import fit_segments, outliers, processing_order
from arbllm.solver import quantize_matrix
from tests.data import needs
from tests.helpers import trellis_values

CODED = pytest.mark.parametrize("coded", [False, True], ids=["groups", "trellis"])


def problem(
    rows: int, columns: int, seed: int = 0, dead: tuple[int, ...] = (), tokens: int = 200
) -> tuple[torch.Tensor, Factor]:
    """A weight, zero where inputs never fire, and the factor of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    weight[:, dead] = inputs[:, dead] = 0
    return weight, factorize(2 / tokens * inputs.T @ inputs)


def error_of(difference: torch.Tensor, factor: Factor) -> float:
    """tr(D H D^T), H damped."""
    return float(((difference @ factor.damped) * difference).sum())


def mixed(columns: int, kind: int = 1, better: int = 8, cuts: int = 2, coded: bool = False) -> list[Segment]:
    """About `cuts` segments of one kind, and one of the next; `coded` for those with a trellis."""
    kinds = TRELLIS_KINDS if coded else KINDS
    widths = [part.numel() for part in torch.arange(columns - better).chunk(cuts)]
    return [Segment(width, *kinds[kind]) for width in widths] + [Segment(better, *kinds[kind + 1])]


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    rows=st.sampled_from([1, 2, 24]),
    segments=st.sampled_from(
        [
            *[[Segment(columns, *kind)] for columns in (1, 13) for kind in KINDS + TRELLIS_KINDS],
            *[mixed(columns, kind) for columns in (16, 29, 60) for kind in range(3)],
            *[mixed(columns, kind, coded=True) for columns in (16, 29, 60) for kind in range(3)],
            [*mixed(40, coded=True), *[Segment(1, 1, 1)] * 2],
            [Segment(20, 1, 1, True), Segment(20, 2, 1), Segment(20, 1, 4, True)],
        ]
    ),
    dead=st.booleans(),
)
def test_parts_reconstruction_and_errors_tell_the_same(seed, rows, segments, dead):
    columns = sum(segment.width for segment in segments)
    weight, factor = problem(rows, columns, seed, (0, columns // 2) if dead and columns > 2 else ())
    fit = fit_segments(weight, factor, segments, rounds=15)
    rebuilt = torch.full_like(weight, torch.nan)
    for part, segment in zip(fit.parts, segments, strict=True):
        assert (len(part.columns), *part.kind) == segment
        assert (part.columns.diff() > 0).all()
        rebuilt[:, part.columns] = trellis_values(part) if isinstance(part, TrellisPart) else part.reconstruct()
    torch.testing.assert_close(rebuilt, fit.reconstruction)
    torch.testing.assert_close(assemble(fit.parts, scale_bits=8).dequantize(), fit.reconstruction)
    whole = error_of(weight, factor)
    assert fit.errors[-1] == pytest.approx(error_of(weight - rebuilt, factor), rel=1e-3, abs=1e-6 * whole)
    assert all(later < earlier for earlier, later in itertools.pairwise(fit.errors))
    assert fit.errors[-1] < 0.6 * whole + 1e-12


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    rows=st.sampled_from([1, 3, 24]),
    kind=st.sampled_from([0, 1, 2]),
    coded=st.booleans(),
)
def test_a_round_raises_the_error_by_no_more_than_the_rounding_of_scales(seed, rows, kind, coded):
    """Without rounding a round cannot raise it; with a trellis that is of rows enough for scales to be positive.

    Rounding changes a weight by about 3 % at most, and about an optimum the error rises by tr(E H E^T) alone.
    """
    rows, segments = 24 if coded else rows, mixed(40, kind, coded=coded)
    weight, factor = problem(rows, 40, seed)
    order = processing_order(weight, factor, segments)
    hessian = factor.damped[order][:, order]
    solving = module._Problem(weight.T[order].contiguous())
    bounds = module._bounds(segments)
    levels = solving.solve(segments, bounds, factor.reordered_upper(order))
    solving.look_at(factor.reordered(order))
    allowed = 0.03**2 * float(torch.linalg.eigvalsh(hessian).max() * weight.square().sum())
    for _ in range(6):
        before = solving.error()
        levels = solving.refine(levels, bounds)
        assert solving.error() <= before + allowed
        exact = error_of(
            (solving.weight - solving.values).T, Factor(hessian, hessian, hessian.diagonal(), factor.dead, 0.0)
        )
        assert solving.error() == pytest.approx(exact, rel=1e-3)


@CODED
def test_a_round_that_raises_the_error_is_undone(coded, monkeypatch):
    weight, factor = problem(8, 24)
    segments = mixed(24, coded=coded)
    kept = fit_segments(weight, factor, segments, rounds=0)
    assert len(kept.errors) == 1
    refine = module._Problem.refine

    def spoil(solving, levels, bounds):
        refined = refine(solving, levels, bounds)
        solving.pull *= 100
        return refined

    monkeypatch.setattr(module._Problem, "refine", spoil)
    fit = fit_segments(weight, factor, segments, rounds=5)
    assert fit.errors == kept.errors
    assert torch.equal(fit.reconstruction, kept.reconstruction)


@CODED
def test_refinement_gains_and_ends_by_itself(coded):
    weight, factor = problem(48, 96)
    segments = mixed(96, coded=coded)
    first = fit_segments(weight, factor, segments, rounds=0)
    refined = fit_segments(weight, factor, segments, rounds=50)
    assert refined.errors[0] == first.errors[0]
    assert refined.errors[-1] < 0.95 * first.errors[0]
    assert 2 < len(refined.errors) < 20
    gains = [1 - later / earlier for earlier, later in itertools.pairwise(refined.errors)]
    assert all(gain >= module.ENOUGH for gain in gains[:-1])


@CODED
def test_correlated_inputs_are_made_use_of(coded):
    weight, factor = problem(48, 96)
    goal, metric = weight.T.contiguous(), torch.eye(96)
    if coded:
        rounded = trellis.choose_levels(goal, trellis.start(goal, 2), metric).values().T
    else:
        rounded = joint.choose_levels(goal, joint.start(goal, 2, 1), metric).values().T
    fit = fit_segments(weight, factor, [Segment(96, *(TRELLIS_KINDS if coded else KINDS)[1])], rounds=15)
    assert fit.errors[-1] < 0.6 * error_of(weight - rounded, factor)


@pytest.mark.parametrize("name", ["k_proj", "down_proj"])
def test_a_trellis_leaves_less_error_in_real_matrices(name):
    """At the same true bits, all scales counted; about a third less."""
    folder = needs("reference")
    with safe_open(folder / "reference.safetensors", "pt") as file:
        names = {key.rpartition(".")[0] for key in file.keys()}  # noqa: SIM118
        (matrix,) = (found for found in names if found.endswith(name))
        weight, factor = file.get_tensor(f"{matrix}.weight").float(), factorize(file.get_tensor(f"{matrix}.hessian"))
    rows, columns = weight.shape
    plain = joint_layout(rows, columns, 2.3, 512, trellis=False)
    coded = joint_layout(rows, columns, matrix_size(plain).true_bits, 512, trellis=True)
    assert matrix_size(coded).true_bits <= matrix_size(plain).true_bits
    errors = [fit_segments(weight, factor, layout.segments, rounds=1).errors[-1] for layout in (plain, coded)]
    assert errors[1] < 0.8 * errors[0]


@CODED
def test_later_segments_make_up_for_earlier_ones(coded):
    """What the first pass leaves is less than what its segments would leave if each saw the original weight."""
    weight, factor = problem(48, 96)
    segments = [Segment(48, *(TRELLIS_KINDS if coded else KINDS)[1])] * 2
    fit = fit_segments(weight, factor, segments, rounds=0)
    apart = weight.clone()
    for part in fit.parts:
        own = factorize(factor.hessian[part.columns][:, part.columns])
        kept = fit_segments(weight[:, part.columns], own, segments[:1], rounds=0)
        apart[:, part.columns] -= kept.reconstruction
    assert fit.errors[0] < 0.9 * error_of(apart, factor)


# Order.


def test_the_more_a_column_weighs_the_more_bits_it_gets():
    weight, factor = problem(24, 40, dead=(3, 17))
    segments = [Segment(16, 1, 1), Segment(16, 1, 1), Segment(8, 2, 1)]
    order = processing_order(weight, factor, segments)
    assert order.sort().values.tolist() == list(range(40))
    inverse = torch.linalg.inv(factor.damped.double())
    energy = weight.double().square().sum(0) / inverse.diagonal()
    assert energy[order[32:]].min() >= energy[order[:32]].max()
    assert {3, 17} <= set(order[:32].tolist())
    # Inside a kind, segments notwithstanding, by falling H_jj.
    diagonal = factor.damped.diagonal()
    for kind in (order[:32], order[32:]):
        assert (diagonal[kind].diff() <= 0).all()


@CODED
def test_dead_inputs_and_silent_layers(coded):
    weight, factor = problem(5, 24, dead=tuple(range(24)))
    fit = fit_segments(weight, factor, mixed(24, coded=coded), rounds=3)
    assert torch.count_nonzero(fit.reconstruction) == 0
    weight, factor = problem(5, 24, dead=(0, 5, 23))
    fit = fit_segments(weight, factor, mixed(24, coded=coded), rounds=3)
    assert torch.isfinite(fit.reconstruction).all()


@CODED
def test_the_same_input_gives_the_same_result(coded):
    weight, factor = problem(12, 40)
    first, second = (fit_segments(weight, factor, mixed(40, coded=coded), rounds=5) for _ in range(2))
    assert first.errors == second.errors
    assert torch.equal(first.reconstruction, second.reconstruction)


def with_outliers(columns: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (64, m) and the Hessian of inputs of which two are a thousand times as large on a few tokens."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2048, columns, generator=generator)
    inputs[:4, [7, 100]] *= 3000
    return torch.randn(64, columns, generator=generator), 2 / 2048 * inputs.T @ inputs


@CODED
def test_outlying_inputs_get_segments_of_their_own(coded):
    weight, hessian = with_outliers()
    assert outliers(hessian) == 2
    matrix = quantize_matrix(weight, hessian, BinarizationConfig(bits=2.6, trellis=coded))
    assert [segment.width for segment in matrix.layout.segments[-2:]] == [1, 1]
    order = matrix.column_order()
    assert order is not None
    assert set(order[-2:].tolist()) == {7, 100}


@CODED
def test_an_input_that_never_fires_is_no_outlier(coded):
    weight, hessian = with_outliers()
    hessian[50:80] = hessian[:, 50:80] = 0
    hessian *= 1e-9
    order = quantize_matrix(weight, hessian, BinarizationConfig(bits=2.6, trellis=coded)).column_order()
    assert order is not None
    assert set(order[-2:].tolist()) == {7, 100}


def test_outliers_are_few():
    hessian = torch.eye(400)
    assert outliers(hessian) == 0
    hessian[range(9), range(9)] = 5e4
    assert outliers(hessian) == 4  # 1 % of the columns
