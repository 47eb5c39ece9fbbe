"""The rung-by-rung evaluation that a controller needs, against the radii of every row."""

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch

from safestep.radius.bounds import (
    RUNG_OPTIONS,
    RUNGS,
    RungOption,
    certified_radius,
    closed_form_radius,
    ladder_radius,
    radius_bound,
)
from safestep.radius.exact import exact_radius

FAMILIES = ("random", "two-cluster", "confident")


def rows_of(family, seed, num_classes, num_rows=8):
    """Logits and tangents, float64, with rows of very different spread."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, num_classes)
    logits, tangent = (2 * torch.randn(*shape, generator=generator).double() for _ in range(2))
    tangent *= torch.rand(num_rows, 1, generator=generator).double()
    if family == "two-cluster":
        tangent = 0.01 * tangent + torch.arange(num_classes) % 2
    elif family == "confident":
        logits[:, 0] += 8
    return logits, tangent


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", RUNGS)
def test_a_rung_is_between_the_one_below_and_the_exact_radius(name, family):
    logits, tangent = rows_of(family, seed=21, num_classes=6, num_rows=40)
    below = {high: low for low, high in pairwise(RUNGS)}.get(name, name)
    rounding = 1 + 1e-12

    radius = RUNGS[name].of_rows(logits, tangent, None)

    assert (radius > 0).all()
    assert (radius <= exact_radius(logits, tangent) * rounding).all()
    assert (radius * rounding >= RUNGS[below].of_rows(logits, tangent, None)).all()
    if not RUNGS[name].needs_logits:
        assert torch.equal(radius, RUNGS[name].of_rows(None, tangent, None))


@pytest.mark.parametrize("name", RUNG_OPTIONS)
def test_a_rung_that_may_be_chosen_is_where_the_ladder_ends(name):
    logits, tangent = rows_of("confident", seed=22, num_classes=6, num_rows=40)
    expected = RUNGS[name].of_rows(logits, tangent, None)

    assert torch.equal(ladder_radius(logits, tangent, rung=name), expected)
    smallest = ladder_radius(logits, tangent, rung=name, only_smallest=True)
    # The scan stops at 0.25 % of the true minimum, wherever its nodes happen to lie.
    torch.testing.assert_close(smallest.min(), expected.min(), rtol=3e-3, atol=0)


def test_type_checkers_know_the_rungs_that_may_be_chosen():
    assert get_args(RungOption) == RUNG_OPTIONS


def test_ladder_without_a_limit_takes_all_rows_to_the_rung():
    logits, tangent = rows_of("confident", seed=12, num_classes=5)

    assert torch.equal(ladder_radius(logits, tangent), certified_radius(logits, tangent))
    assert torch.equal(ladder_radius(None, tangent, rung="bound"), radius_bound(tangent))


def test_ladder_climbs_only_where_the_limit_is_in_question():
    """Confident rows at growing steps: the bound, the closed form, then the scan decides."""
    logits = torch.tensor([10.0, 0.0, 1.0], dtype=torch.float64).expand(40, 3)
    slope = torch.tensor([1.0, 0.0, 0.3], dtype=torch.float64)
    tangent = slope * torch.linspace(0.1, 20, 40, dtype=torch.float64).unsqueeze(1)
    rungs = [radius_bound(tangent), closed_form_radius(logits, tangent)]
    rungs.append(certified_radius(logits, tangent))

    radius = ladder_radius(logits, tangent, limit=1.0)

    expected = torch.where(rungs[1] >= 1, rungs[1], rungs[2])
    expected = torch.where(rungs[0] >= 1, rungs[0], expected)
    torch.testing.assert_close(radius, expected, rtol=1e-12, atol=0)
    assert all(((radius == rung) & (radius >= 1)).any() for rung in rungs[:2])
    assert (radius < 1).any()


def test_ladder_does_not_read_the_logits_where_the_bound_settles_all():
    """Tensors on the meta device hold no numbers: reading one would raise."""
    tangent = torch.rand(6, 4)

    radius = ladder_radius(torch.empty(6, 4, device="meta"), tangent, limit=1.0)

    assert torch.equal(radius, radius_bound(tangent))


@pytest.mark.parametrize("limit", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_ladder_answers_the_question_as_the_certified_radius_does(family, limit):
    logits, tangent = rows_of(family, seed=13, num_classes=6, num_rows=64)
    tangent = tangent * torch.logspace(-2, 2, 64, dtype=torch.float64).unsqueeze(1)
    certified = certified_radius(logits, tangent)

    radius = ladder_radius(logits, tangent, limit=limit)

    over = certified < 1 / limit
    assert torch.equal(radius < 1 / limit, over)
    torch.testing.assert_close(radius[over], certified[over], rtol=1e-12, atol=0)


def test_ladder_keeps_masked_rows_infinite_and_broken_rows_nan():
    logits, tangent = rows_of("random", seed=14, num_classes=4)
    tangent = 10 * tangent
    tangent[1], tangent[2], logits[5] = math.nan, math.nan, math.nan
    mask = torch.arange(8) != 2

    radius = ladder_radius(logits, tangent, mask=mask, limit=1.0)

    assert radius.isnan().tolist() == [False, True, False, False, False, True, False, False]
    assert radius[2] == math.inf


def test_ladder_ignores_classes_that_do_not_exist():
    logits, tangent = rows_of("random", seed=15, num_classes=4)
    expected = ladder_radius(logits[:, :3], tangent[:, :3], limit=1e-3)
    tangent[:, 3] = math.nan
    mask = (torch.arange(4) != 3).expand(8, 4)

    by_mask = ladder_radius(logits, tangent, mask=mask, limit=1e-3)
    by_logit = ladder_radius(logits.masked_fill(~mask, -math.inf), tangent, limit=1e-3)

    torch.testing.assert_close(by_mask, expected)
    torch.testing.assert_close(by_logit, expected)


def test_ladder_rejects_what_it_cannot_answer():
    tangent = torch.ones(2, 3)
    with pytest.raises(ValueError, match="expected `limit` > 0, got 0"):
        ladder_radius(tangent, tangent, limit=0.0)
    with pytest.raises(ValueError, match="expected `logits` for rung 'certified', got None"):
        ladder_radius(None, tangent, limit=1.0)
    names = " or ".join(map(repr, RUNG_OPTIONS))
    with pytest.raises(ValueError, match=f"`rung` {names}, got 'exact'"):
        ladder_radius(tangent, tangent, rung="exact")


@pytest.mark.parametrize("limit", [None, 0.5, 1e-3], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_ladder_finds_the_smallest_radius_without_climbing_every_row(family, limit):
    logits, tangent = rows_of(family, seed=3, num_classes=7, num_rows=300)
    logits[4, 2], tangent[4, 2] = -math.inf, math.nan
    mask = torch.arange(300) % 9 != 0
    certified = certified_radius(logits, tangent, mask=mask)

    radius = ladder_radius(logits, tangent, mask=mask, limit=limit, only_smallest=True)

    smallest = certified.min()
    if limit is not None and smallest >= 1 / limit:
        assert (radius >= 1 / limit).all()
    else:
        # The scan stops at 0.25 % of the true minimum, wherever its nodes happen to lie.
        torch.testing.assert_close(radius.min(), smallest, rtol=3e-3, atol=0)
    assert (radius[mask] >= radius_bound(tangent, mask=logits > -math.inf)[mask]).all()


def test_ladder_keeps_a_broken_row_nan_when_only_the_smallest_is_wanted():
    logits, tangent = rows_of("random", seed=4, num_classes=5, num_rows=40)
    tangent[33, 1] = math.nan

    radius = ladder_radius(logits, tangent, limit=1e-3, only_smallest=True)

    assert radius[33].isnan()
    assert radius.min().isnan()


@pytest.mark.parametrize("num_rows", [1, 5, 16, 40])
@pytest.mark.parametrize("classes", [7, 2500])
def test_the_smallest_radius_stands_at_the_row_that_has_it(num_rows, classes):
    for seed in range(3):
        logits, tangent = rows_of("random", seed, classes, num_rows)

        radius = ladder_radius(logits, tangent, limit=1e-3, only_smallest=True)

        certified = certified_radius(logits, tangent)
        assert radius.argmin() == certified.argmin()
        torch.testing.assert_close(radius.min(), certified.min(), rtol=3e-3, atol=0)
        assert (radius <= certified * (1 + 3e-3)).all()
