"""The histogram of a row with many classes bounds its radius from below."""

import math

import pytest
import torch

from safestep.radius.batch import LogitTangent, smallest_row
from safestep.radius.bounds import certified_radius, ladder_radius
from safestep.radius.histogram import BINS, coarse_radius, histogram


def row_of(kind, classes, scale, seed=0):
    """Return one row of logits and a tangent, float64."""
    generator = torch.Generator().manual_seed(seed)
    logits, tangent, other = torch.randn(3, 1, classes, generator=generator, dtype=torch.float64)
    logits = scale * logits
    if kind == "heavy-tailed":  # most classes share one bin
        tangent = tangent / other
    elif kind == "confident":
        logits[0, 7] += 30
    elif kind == "aligned":
        tangent = tangent + 0.3 * logits
    return logits, tangent


def block_of(logits, tangent):
    """Return what reads blocks of classes."""
    return lambda classes: (logits[:, classes], tangent[:, classes])


def coarse(logits, tangent):
    """Return the coarse radius of rows, in units of 1 / spread."""
    lowest, highest = tangent.amin(-1), tangent.amax(-1)
    block = block_of(logits, tangent)
    return coarse_radius(*histogram(block, logits.shape[-1], lowest, highest - lowest))


def source_of(logits):
    """Return what computes these logits, a block at a time."""
    flat = logits.flatten(0, -2)
    return lambda rows=None, classes=slice(None): (flat if rows is None else flat[rows])[:, classes]


def brute_force_radius(logits, tangent):
    """Return rung 4 by its definition, on a fine grid of u."""
    span = tangent.max() - tangent.min()
    slope = (tangent - tangent.min()) / span
    u = torch.linspace(-32, 32, 3201, dtype=torch.float64)
    share = (logits + u[:, None] * slope).softmax(-1)
    mean = (share * slope).sum(-1, keepdim=True)
    variance = (share * (slope - mean) ** 2).sum(-1)
    # Left out: the u around 0 at which the class that holds more than half there still does.
    start = len(u) // 2
    rules = share[:, share[start].argmax()] > 0.5
    right = start + rules[start:].int().cumprod(0).sum()
    left = start - rules[: start + 1].flip(0).int().cumprod(0).sum()
    counts = torch.ones(len(u), dtype=torch.bool)
    counts[left + 1 : right] = False
    values = (u**2 + math.pi**2 / (4 * variance)).sqrt()[counts]
    return min([32.0, *values.tolist()])  # what lies beyond the grid is larger


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "confident", "aligned"])
@pytest.mark.parametrize("scale", [0.0, 2.0, 8.0], ids=str)
@pytest.mark.parametrize("block", [3000, 700], ids=str)
def test_coarse_radius_is_never_above_the_definition_and_close_below(
    kind, scale, block, monkeypatch
):
    monkeypatch.setattr("safestep.radius.histogram.BLOCK_ELEMENTS", block)
    for seed in range(2):
        logits, tangent = row_of(kind, 3000, scale, seed)
        truth = brute_force_radius(logits, tangent)

        radius = coarse(logits, tangent).item()

        assert radius <= truth * (1 + 1e-6)
        if truth < 12:
            assert radius > 0.97 * truth


@pytest.mark.parametrize("rise", [0.0, 30.0, 200.0, -200.0], ids=str)
def test_histogram_in_blocks_is_that_of_the_whole(rise, monkeypatch):
    """Whether the heaviest classes come early or late, and the others vanish beside them or not."""
    rows = [row_of(kind, 3000, 2.0, seed) for seed in range(3) for kind in ("normal", "confident")]
    logits, tangent = (torch.cat(each) for each in zip(*rows, strict=True))
    logits = logits + torch.linspace(0, rise, 3000, dtype=torch.float64)
    lowest, spread = tangent.amin(-1), tangent.amax(-1) - tangent.amin(-1)
    bins = ((tangent - lowest[:, None]) / spread[:, None] * (BINS * (1 - 1e-5))).long()
    weight = (logits - logits.amax(-1, keepdim=True)).exp()
    top = logits.argmax(-1, keepdim=True)
    expected = torch.zeros(6, BINS).double().scatter_add(-1, bins, weight.scatter(-1, top, 0.0))
    slope = (tangent.gather(-1, top) - lowest[:, None]) / spread[:, None]

    for block in (6 * 3000, 6 * 700, 6):
        monkeypatch.setattr("safestep.radius.histogram.BLOCK_ELEMENTS", block)
        found, top_slope = histogram(block_of(logits, tangent), 3000, lowest, spread)

        torch.testing.assert_close(found[:, 1:], expected, rtol=1e-12, atol=1e-200)
        torch.testing.assert_close(found[:, 0], torch.ones(6).double())
        torch.testing.assert_close(top_slope, slope)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("place", [3, 2400])
def test_computed_row_with_a_broken_logit_is_nan(value, place, monkeypatch):
    monkeypatch.setattr("safestep.radius.histogram.BLOCK_ELEMENTS", 2 * 700)
    logits, tangent = (each.expand(2, -1).clone() for each in row_of("normal", 2500, 1.0))
    logits[1, place] = value

    radius = ladder_radius(source_of(logits), tangent, limit=1e-3, only_smallest=True)

    assert radius.isnan().tolist() == [False, True]


def test_computed_logits_are_never_asked_for_whole_rows_but_of_the_smallest(monkeypatch):
    monkeypatch.setattr("safestep.radius.histogram.BLOCK_ELEMENTS", 9 * 700)
    rows = [row_of("normal", 2500, 1.0, seed) for seed in range(9)]
    logits, tangent = (torch.cat(each).float() for each in zip(*rows, strict=True))
    tangent[4] *= 1.5
    source, asked = source_of(logits), []

    def watched(rows=None, classes=slice(None)):
        asked.append(tuple(source(rows, classes).shape))
        return source(rows, classes)

    radius = ladder_radius(watched, tangent, limit=1e-3, only_smallest=True)

    assert asked == [(9, 700)] * 3 + [(9, 400), (1, 2500)]
    assert radius.argmin() == 4
    torch.testing.assert_close(
        radius[4], certified_radius(logits, tangent)[4], rtol=3e-3, atol=0
    )  # the tolerance of the scan


def test_mask_of_classes_is_refused_for_computed_logits():
    logits, tangent = torch.randn(2, 3, 5).unbind()

    with pytest.raises(ValueError, match="expected a `mask` of rows"):
        ladder_radius(source_of(logits), tangent, mask=torch.ones(3, 5).bool(), limit=1.0)


@pytest.mark.parametrize("scale", [0.0, 2.0, 12.0], ids=str)
@pytest.mark.parametrize("limit", [None, 1e-3], ids=str)
def test_ladder_finds_the_smallest_radius_of_rows_of_many_classes(scale, limit):
    rows = [row_of(kind, 2500, scale, seed) for seed in range(4) for kind in ("normal", "aligned")]
    logits, tangent = (torch.cat(each).float() for each in zip(*rows, strict=True))

    radius = ladder_radius(logits, tangent, limit=limit, only_smallest=True)

    # The scan stops at 0.25 % of the true minimum, wherever its nodes happen to lie.
    torch.testing.assert_close(
        radius.min(), certified_radius(logits, tangent).min(), rtol=3e-3, atol=0
    )


def test_broken_row_of_many_classes_stays_nan():
    logits, tangent = row_of("normal", 2500, 1.0)
    tangent = torch.cat([tangent, tangent])
    tangent[1, 3] = math.nan

    radius = ladder_radius(logits.expand(2, -1), tangent, limit=1e-3, only_smallest=True)

    assert radius[1].isnan()
    assert radius.min().isnan()


@pytest.mark.parametrize("limit", [None, 1.0, 1e-2], ids=str)
def test_rows_in_tiles_have_the_smallest_radius_of_the_whole(limit):
    rows = [row_of("normal", 2500, 1.0, seed) for seed in range(9)]
    logits, tangent = (torch.cat(each).float() for each in zip(*rows, strict=True))
    tiles = [
        LogitTangent("logits", *tile)
        for tile in zip(logits.split(2), tangent.split(2), strict=True)
    ]

    tiled = smallest_row(tiles, rung="certified", limit=limit)
    whole = smallest_row([LogitTangent("logits", logits, tangent)], rung="certified", limit=limit)

    torch.testing.assert_close(tiled, whole, rtol=1e-6, atol=0)


def test_logits_are_not_computed_where_the_bound_settles_every_row():
    def logits(rows=None, classes=slice(None)):
        raise AssertionError("asked for the logits")

    tangent = torch.tensor([[0.0, 1.0], [2.0, 0.5]])

    row = LogitTangent("logits", logits, tangent)
    radius, *_ = smallest_row([row], rung="certified", limit=1.0).tolist()

    assert radius == pytest.approx(math.pi / 1.5)
    with pytest.raises(AssertionError, match="asked for the logits"):
        smallest_row([row], rung="certified", limit=0.1)


@pytest.mark.parametrize("count", [1, 5])
def test_rows_whose_logits_are_computed_are_measured_like_rows_that_are_held(count):
    logits, tangent = torch.randn(2, count, 3, 40, dtype=torch.float64).unbind()
    mask = torch.rand(count, 3) < 0.7
    mask[0, 0] = True
    held = LogitTangent("logits", logits, 5 * tangent, mask)
    computed = LogitTangent("logits", source_of(logits), 5 * tangent, mask)

    for limit in (None, 1.0):
        expected = smallest_row([held], rung="certified", limit=limit)
        torch.testing.assert_close(
            smallest_row([computed], rung="certified", limit=limit), expected
        )


def test_classes_and_rows_that_do_not_count_are_left_out_of_a_histogram():
    rows = [row_of(kind, 2500, 2.0, seed) for seed in range(3) for kind in ("normal", "confident")]
    logits, tangent = (torch.cat(each).float() for each in zip(*rows, strict=True))
    logits[1, 40:90] = -math.inf
    tangent[1, 40:90] = 1e4
    tangent[2] = 0.0
    mask = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)) < 0.8
    mask[3] = False

    radius = ladder_radius(logits, tangent, mask=mask, limit=1e-3, only_smallest=True)

    exact = certified_radius(logits, tangent, mask=mask)
    assert torch.isinf(radius[[2, 3]]).all()
    assert (radius <= exact * (1 + 1e-5)).all()
    torch.testing.assert_close(radius.min(), exact.min(), rtol=3e-3, atol=0)
