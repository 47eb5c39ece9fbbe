"""The ladder of radii against closed forms, polynomial roots, dense scans and its symmetries."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from safestep.radius.bounds import (
    certified_radius,
    closed_form_radius,
    ladder_radius,
    logit_spread,
    radius_bound,
    strip_radius,
)
from safestep.radius.exact import exact_radius

FAMILIES = ("random", "two-cluster", "confident", "near-tie", "heavy-tailed")
WITH_LOGITS = (closed_form_radius, strip_radius, certified_radius, exact_radius)
# float64 against float64, through a scan of some dozens of operations.
ROUNDING = 1e-12
deterministic = settings(derandomize=True, deadline=None, database=None, max_examples=15)


def rows_of(family, seed, num_classes, num_rows=8):
    """Logits and tangents, float64, of the kinds that training produces."""
    rng = np.random.default_rng(seed)
    logits, tangent = 2 * rng.normal(size=(2, num_rows, num_classes))
    if family == "two-cluster":
        tangent = 0.01 * tangent + (np.arange(num_classes) % 2)
    elif family == "confident":
        logits[:, rng.integers(num_classes)] += 8
    elif family == "near-tie":
        logits, tangent = 1e-9 * logits, 1e-9 * tangent
        tangent[:, 0] += 1
    elif family == "heavy-tailed":
        tangent = tangent**5
    return torch.tensor(logits), torch.tensor(tangent)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


# Closed forms


def test_spread_is_the_range_over_the_last_axis():
    tangent = f64([[0.5, -1.5, 0.0], [3.0, 3.0, 3.0]], [[1.0, 2.0, 4.0], [0.0, 0.0, -7.0]])

    torch.testing.assert_close(logit_spread(tangent), f64([2.0, 0.0], [3.0, 7.0]))


def test_bound_is_pi_over_the_spread():
    torch.testing.assert_close(
        radius_bound(f64([1.0, -1.0], [0.0, 0.0])), f64(math.pi / 2, math.inf)
    )


def test_closed_form_radius_is_the_first_formula_near_balance():
    """At p = (.9, .1) and slopes (1, 0): variance .09, kappa = 1 / .36."""
    radius = closed_form_radius(f64([math.log(9), 0.0]), f64([1.0, 0.0]))

    expected = math.hypot(math.log(1 / 0.36), math.pi)
    torch.testing.assert_close(radius, f64(expected), rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("gap", [8.0, 40.0, 900.0])
def test_closed_form_radius_solves_its_equation_where_confident(gap):
    """Variance p (1 - p) with 1 - p = exp(-gap) to rounding: L = gap - log 4."""
    radius = closed_form_radius(f64([gap, 0.0]), f64([1.0, 0.0])).item()

    x = math.sqrt(1 + radius**2) - 1
    log_kappa = gap - math.log(4) + 2 * math.log1p(math.exp(-gap))
    assert x + math.log(x) == pytest.approx(math.log(math.pi**2 / 2) + log_kappa, rel=1e-12)


@pytest.mark.parametrize("rung", WITH_LOGITS[2:], ids=lambda rung: rung.__name__)
def test_two_classes_give_the_exact_binary_formula(rung):
    rng = np.random.default_rng(0)
    logits, tangent = rng.normal(size=(2, 500, 2))
    logits *= rng.choice([0, 1e-3, 1, 30, 1e4], size=(500, 1))
    expected = np.hypot(logits[:, 0] - logits[:, 1], np.pi) / abs(tangent[:, 0] - tangent[:, 1])

    radius = rung(torch.tensor(logits), torch.tensor(tangent))

    np.testing.assert_allclose(radius.numpy(), expected, rtol=1e-9)


# The order of the rungs


@deterministic
@given(st.sampled_from(FAMILIES), st.integers(0, 2**32 - 1), st.integers(2, 40))
def test_every_rung_is_at_least_the_one_before_and_none_above_the_exact(family, seed, num_classes):
    logits, tangent = rows_of(family, seed, num_classes)

    radius = [radius_bound(tangent), *(rung(logits, tangent) for rung in WITH_LOGITS)]

    assert all((lower <= upper).all() for lower, upper in itertools.pairwise(radius))


@deterministic
@given(
    st.lists(
        st.tuples(st.floats(-1e4, 1e4), st.floats(-1e30, 1e30)),
        min_size=2,
        max_size=6,
    )
)
@example([(0.0, 6926139916288.0), (0.0, -2.9e-10), (1.0, 0.0)])  # slopes 4e-23 apart
def test_rungs_keep_their_order_on_any_finite_row(row):
    logits, tangent = torch.tensor(row).T.unsqueeze(1)

    bound, closed_form = radius_bound(tangent), closed_form_radius(logits, tangent)
    strip, certified = strip_radius(logits, tangent), certified_radius(logits, tangent)

    assert bound <= closed_form <= strip <= certified


@pytest.mark.parametrize("slopes", [(0, 1), (0, 1, 3), (-2, 0, 5), (0, 1, 2, 3, 9)], ids=str)
def test_rungs_stay_under_the_polynomial_roots_of_integer_slopes(slopes):
    """Integer slopes turn the partition function into a polynomial in exp(t)."""
    logits = 3 * np.random.default_rng(0).normal(size=(50, len(slopes)))
    nearest = []
    for row in logits:
        coefficients = np.zeros(max(slopes) - min(slopes) + 1)
        coefficients[np.array(slopes) - min(slopes)] = np.exp(row - row.max())
        nearest.append(abs(np.log(np.roots(coefficients[::-1]).astype(complex))).min())
    tangent = torch.tensor(slopes, dtype=torch.float64).expand(50, -1)

    for rung in (closed_form_radius, strip_radius, certified_radius):
        # numpy.roots is good to some 1e-12 on these.
        assert (
            rung(torch.tensor(logits), tangent).numpy() <= np.array(nearest) * (1 + 1e-10)
        ).all()


def dense_minimum(logits, tangent, *, drop_dominated):
    """Minimum of the strip bound over a grid of 1e-3 in one row, in plain numpy."""
    spread = np.ptp(tangent)
    u = np.arange(-60_000, 60_001)[:, None] * 1e-3
    weight = np.exp(
        logits + u * tangent / spread - (logits + u * tangent / spread).max(1, keepdims=True)
    )
    weight /= weight.sum(1, keepdims=True)
    mean = weight @ tangent / spread
    variance = (weight * (tangent / spread - mean[:, None]) ** 2).sum(1)
    value = np.sqrt(u[:, 0] ** 2 + np.pi**2 / (4 * variance))
    if drop_dominated:
        over_half = weight.max(1) > 0.5
        zero = len(u) // 2
        if over_half[zero]:
            free = np.flatnonzero(~over_half)
            value[max(free[free < zero], default=-1) + 1 : min(free[free > zero], default=None)] = (
                np.inf
            )
    return value.min() / spread


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rung", [strip_radius, certified_radius], ids=lambda rung: rung.__name__)
def test_scan_is_under_a_dense_grid_and_loses_a_quarter_percent_at_most(rung, family):
    logits, tangent = rows_of(family, seed=1, num_classes=7, num_rows=12)
    drop = rung is certified_radius
    pairs = zip(logits.numpy(), tangent.numpy(), strict=True)
    dense = torch.tensor([dense_minimum(*pair, drop_dominated=drop) for pair in pairs])

    ratio = rung(logits, tangent) / dense

    assert (ratio <= 1 + 1e-12).all()
    # The grid itself is up to 1e-4 above the minimum.
    assert (ratio >= 1 - 2.5e-3 - 1e-4).all()


# Symmetries


@deterministic
@given(st.sampled_from(FAMILIES), st.integers(0, 2**32 - 1), st.integers(2, 12))
def test_radii_ignore_shifts_and_the_order_of_classes(family, seed, num_classes):
    logits, tangent = rows_of(family, seed, num_classes)
    order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed % 2**31))

    for rung in (closed_form_radius, strip_radius, certified_radius):
        radius = rung(logits, tangent)
        # A shift of 1 costs 1e-16 absolute in numbers that are compared to 1e-9.
        torch.testing.assert_close(rung(logits + 1, tangent - 1), radius, rtol=1e-6, atol=0)
        permuted = rung(logits[:, order], tangent[:, order])
        torch.testing.assert_close(permuted, radius, rtol=1e-6, atol=0)


@pytest.mark.parametrize("factor", [-1.0, 3.0, -1e-30, 1e30], ids=str)
@pytest.mark.parametrize("rung", WITH_LOGITS, ids=lambda rung: rung.__name__)
def test_radius_is_inverse_to_the_scale_of_the_tangent(rung, factor):
    logits, tangent = rows_of("random", seed=2, num_classes=9)

    scaled = rung(logits, factor * tangent)

    # Minus mirrors the scan, which then stops at other nodes: within its 0.25 %.
    rtol = 2.5e-3 if factor < 0 else 1e-12
    torch.testing.assert_close(scaled * abs(factor), rung(logits, tangent), rtol=rtol, atol=0)


# Precision and range


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_radius_of_low_precision_is_float32_of_the_rounded_numbers(dtype):
    logits, tangent = (each.to(dtype) for each in rows_of("random", seed=3, num_classes=9))

    for rung in (closed_form_radius, strip_radius, certified_radius):
        radius = rung(logits, tangent)
        reference = rung(logits.double(), tangent.double())
        assert radius.dtype == torch.float32
        torch.testing.assert_close(radius.double(), reference, rtol=1e-5, atol=0)
    assert logit_spread(tangent).dtype == torch.float32
    torch.testing.assert_close(
        logit_spread(tangent).double(), logit_spread(tangent.double()), rtol=1e-7, atol=0
    )


def test_radius_of_mixed_precision_has_the_wider_type():
    logits, tangent = rows_of("random", seed=3, num_classes=3)

    assert certified_radius(logits, tangent.bfloat16()).dtype == torch.float64
    assert ladder_radius(logits, tangent.bfloat16(), limit=1e9).dtype == torch.float64


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e4], ids=str)
def test_radius_of_extreme_float32_rows_matches_float64(scale, size):
    logits, tangent = rows_of("random", seed=4, num_classes=6, num_rows=16)
    logits, tangent = (size * logits).float(), (scale * tangent).float()
    exact = exact_radius(logits, tangent)

    for rung in WITH_LOGITS[:3]:
        radius = rung(logits, tangent).double()
        # Two scans that stop at other nodes differ by 0.25 % at most.
        expected = rung(logits.double(), tangent.double())
        torch.testing.assert_close(radius, expected, rtol=3e-3, atol=0)
        # float32 rounds the slopes to 1e-7 of their spread and log f to 1e-6.
        assert (radius <= exact * (1 + 1e-5)).all()


# Rows and classes that are not there


@pytest.mark.parametrize("rung", WITH_LOGITS, ids=lambda rung: rung.__name__)
def test_radius_is_infinite_where_nothing_changes(rung):
    for tangent in (f64([2.0, 2.0]), f64([2.0])):
        assert rung(torch.ones_like(tangent), tangent).item() == math.inf
        assert radius_bound(tangent).item() == math.inf
        assert logit_spread(tangent).item() == 0


@pytest.mark.parametrize("rung", WITH_LOGITS, ids=lambda rung: rung.__name__)
def test_class_of_logit_minus_infinity_is_as_good_as_removed(rung):
    logits, tangent = rows_of("random", seed=5, num_classes=5)
    padded = torch.cat([logits, torch.full((8, 3), -math.inf, dtype=torch.float64)], dim=1)
    junk = f64(math.nan, math.inf, 1e300).expand(8, 3)

    radius = rung(padded, torch.cat([tangent, junk], dim=1))

    torch.testing.assert_close(radius, rung(logits, tangent), rtol=1e-9, atol=0)


@pytest.mark.parametrize("rung", WITH_LOGITS, ids=lambda rung: rung.__name__)
def test_class_mask_is_as_good_as_removing_classes(rung):
    logits, tangent = rows_of("confident", seed=6, num_classes=6)
    mask = torch.tensor([True, False, True, True, False, True]).expand(8, 6)
    expected = rung(logits[mask].reshape(8, 4), tangent[mask].reshape(8, 4))
    logits = logits.masked_fill(~mask, math.nan)
    tangent = tangent.masked_fill(~mask, math.nan)

    torch.testing.assert_close(rung(logits, tangent, mask=mask), expected, rtol=1e-9, atol=0)
    kept = tangent[mask].reshape(8, 4)
    torch.testing.assert_close(logit_spread(tangent, mask=mask), logit_spread(kept))


@pytest.mark.parametrize("rung", WITH_LOGITS, ids=lambda rung: rung.__name__)
def test_masked_row_has_infinite_radius_whatever_it_holds(rung):
    logits, tangent = rows_of("random", seed=7, num_classes=4, num_rows=6)
    logits, tangent = logits.reshape(2, 3, 4), tangent.reshape(2, 3, 4)
    expected = rung(logits, tangent)
    logits[0, 1], tangent[1, 2] = math.nan, math.inf
    mask = torch.tensor([[True, False, True], [True, True, False]])

    radius = rung(logits, tangent, mask=mask)

    assert (radius[~mask] == math.inf).all()
    torch.testing.assert_close(radius[mask], expected[mask])
    assert (logit_spread(tangent, mask=mask)[~mask] == 0).all()
    assert (radius_bound(tangent, mask=mask)[~mask] == math.inf).all()


@pytest.mark.parametrize("rung", WITH_LOGITS, ids=lambda rung: rung.__name__)
def test_row_with_one_class_left_has_infinite_radius(rung):
    logits, tangent = f64([1.0, -math.inf], [-math.inf, -math.inf]), f64([1.0, 5.0], [1.0, 5.0])

    assert (rung(logits, tangent) == math.inf).all()


# Numbers that are none


@pytest.mark.parametrize("rung", WITH_LOGITS, ids=lambda rung: rung.__name__)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("place", ["logits", "tangent"])
def test_non_finite_row_gives_nan_and_leaves_the_others_alone(rung, bad, place):
    logits, tangent = rows_of("random", seed=8, num_classes=4)
    expected = rung(logits, tangent)
    (logits if place == "logits" else tangent)[3, 2] = bad

    radius = rung(logits, tangent)

    assert radius[3].isnan()
    others = torch.arange(8) != 3
    torch.testing.assert_close(radius[others], expected[others])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_spread_and_bound_of_a_non_finite_tangent_are_nan(bad):
    for tangent in (f64([0.0, bad, 1.0]), f64([bad, bad, bad]), f64([bad])):
        assert logit_spread(tangent).isnan().all()
        assert radius_bound(tangent).isnan().all()


def test_spread_too_large_for_its_type_is_nan():
    assert logit_spread(torch.tensor([3e38, -3e38])).isnan()


def test_non_finite_logit_is_seen_where_the_tangent_is_constant():
    assert certified_radius(f64([math.nan, 1.0]), f64([2.0, 2.0])).isnan()


# Shapes


def test_leading_axes_are_kept_and_may_be_empty():
    logits, tangent = rows_of("random", seed=9, num_classes=3, num_rows=6)

    for shape in [(6,), (2, 3), (1, 6, 1)]:
        radius = certified_radius(logits.reshape(*shape, 3), tangent.reshape(*shape, 3))
        torch.testing.assert_close(radius, certified_radius(logits, tangent).reshape(shape))
    assert certified_radius(logits[0], tangent[0]).shape == ()
    assert certified_radius(logits[:0], tangent[:0]).shape == (0,)


def test_radius_does_not_depend_on_the_size_of_the_chunks(monkeypatch):
    logits, tangent = rows_of("random", seed=10, num_classes=5, num_rows=20)
    whole = [rung(logits, tangent) for rung in WITH_LOGITS]

    monkeypatch.setattr("safestep.radius.rows.CHUNK_ELEMENTS", 15)
    monkeypatch.setattr("safestep.radius.exact.CHUNK_ELEMENTS", 15)

    for rung, expected in zip(WITH_LOGITS, whole, strict=True):
        torch.testing.assert_close(rung(logits, tangent), expected)


def test_arguments_are_left_as_they_were_and_no_graph_is_built():
    logits, tangent = rows_of("random", seed=11, num_classes=5)
    before = logits.clone(), tangent.clone()
    logits.requires_grad_()

    radius = ladder_radius(logits, tangent, limit=0.1)

    assert not radius.requires_grad
    assert torch.equal(logits, before[0])
    assert torch.equal(tangent, before[1])


@pytest.mark.parametrize(
    ("logits", "tangent", "mask", "error", "message"),
    [
        (torch.ones(2, 0), torch.ones(2, 0), None, ValueError, "classes on the last axis"),
        (torch.ones(()), torch.ones(()), None, ValueError, r"got shape \(\)"),
        (torch.ones(2, 3), torch.ones(3), None, ValueError, "`logits` of the shape"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2), TypeError, "`mask` of dtype bool"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(3) > 0, ValueError, r"`mask` of shape"),
    ],
)
def test_arguments_that_do_not_fit_raise(logits, tangent, mask, error, message):
    for rung in (*WITH_LOGITS, lambda *rows, mask: ladder_radius(*rows, mask=mask, limit=1.0)):
        with pytest.raises(error, match=message):
            rung(logits, tangent, mask=mask)


# Rung by rung
