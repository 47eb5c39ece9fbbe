"""The exact radius against polynomial roots and zeros counted independently of the package."""

import math

import numpy as np
import pytest
import torch

from safestep.radius.bounds import certified_radius
from safestep.radius.exact import exact_radius


def random_rows(num_rows, num_classes, seed):
    """Logits from balanced to confident, tangents from even to heavy-tailed, in numpy."""
    rng = np.random.default_rng(seed)
    logits, tangent = rng.normal(size=(2, num_rows, num_classes))
    logits *= rng.choice([0.1, 1, 3, 6], size=(num_rows, 1))
    power = rng.choice([1, 3], size=(num_rows, 1))
    return logits, np.sign(tangent) * abs(tangent) ** power


def zeros_counted(logits, tangent, radius, samples=3000):
    """Zeros with |t| < radius of one row: the turn of the phase along an evenly sampled circle."""
    circle = radius * np.exp(1j * np.linspace(0, 2 * np.pi, samples + 1))[:, None]
    exponent = logits + circle * tangent
    exponent = exponent - exponent.real.max(axis=1, keepdims=True)
    phase = np.unwrap(np.angle(np.exp(exponent).sum(axis=1)))
    if abs(np.diff(phase)).max() > 2:  # too coarse to be a reference
        return zeros_counted(logits, tangent, radius, 8 * samples)
    return round((phase[-1] - phase[0]) / (2 * np.pi))


def assert_no_zero_is_missed(num_rows, num_classes, seed):
    logits, tangent = random_rows(num_rows, num_classes, seed)

    radius = exact_radius(torch.tensor(logits), torch.tensor(tangent)).numpy()

    assert np.isfinite(radius).all()
    for z, a, nearest in zip(logits, tangent, radius, strict=True):
        assert zeros_counted(z, a, nearest * 0.99) == 0
        assert zeros_counted(z, a, nearest * 1.01) >= 2


@pytest.mark.parametrize("num_classes", [2, 3, 12])
def test_exact_radius_misses_no_zero_on_random_rows(num_classes):
    assert_no_zero_is_missed(100, num_classes, seed=num_classes)


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [2, 3, 5, 12, 30])
def test_exact_radius_misses_no_zero_on_ten_thousand_random_rows(num_classes):
    assert_no_zero_is_missed(2000, num_classes, seed=100 + num_classes)


@pytest.mark.parametrize(("num_classes", "largest"), [(2, 3), (3, 8), (5, 12), (9, 20)], ids=str)
def test_exact_radius_is_the_nearest_root_for_integer_slopes(num_classes, largest):
    """Integer slopes turn the partition function into a polynomial in exp(t)."""
    rng = np.random.default_rng(0)
    slopes = np.array([rng.choice(largest, num_classes, replace=False) for _ in range(100)])
    logits = rng.normal(size=slopes.shape) * rng.choice([0.1, 1, 3], size=(100, 1))
    nearest = []
    for z, a in zip(logits, slopes - slopes.min(axis=1, keepdims=True), strict=True):
        coefficients = np.zeros(a.max() + 1)
        coefficients[a] = np.exp(z - z.max())
        nearest.append(abs(np.log(np.roots(coefficients[::-1]).astype(complex))).min())

    radius = exact_radius(torch.tensor(logits), torch.tensor(slopes)).numpy()

    np.testing.assert_allclose(radius, nearest, rtol=1e-10)


def test_exact_radius_tells_apart_zeros_of_nearly_the_same_modulus():
    """Far out the zeros delta + i pi (2k + 1) of two classes differ by 1e-7 and less."""
    delta = 1e4
    logits = torch.tensor([delta, 0.0], dtype=torch.float64)

    radius = exact_radius(logits, torch.tensor([0.0, 1.0])).item()

    assert radius == pytest.approx(math.hypot(delta, math.pi), rel=1e-12)


@pytest.mark.parametrize("power", [2, 9])
def test_exact_radius_is_nan_where_no_count_can_be_trusted(power):
    """(1 + exp t)^power is the smaller part of its terms in a wide disc about its multiple zero."""
    terms = [math.comb(power, k) for k in range(power + 1)]
    logits = torch.tensor(terms, dtype=torch.float64).log()

    assert exact_radius(logits, torch.arange(power + 1.0)).isnan()


def test_exact_radius_is_float64_and_at_least_the_certified_one():
    logits, tangent = (torch.tensor(each).float() for each in random_rows(50, 6, seed=1))

    radius = exact_radius(logits, tangent)

    assert radius.dtype == torch.float64
    assert (radius >= certified_radius(logits.double(), tangent.double())).all()


def test_exact_radius_of_a_large_vocabulary():
    logits, tangent = (torch.tensor(each) for each in random_rows(2, 1000, seed=2))

    radius = exact_radius(logits, tangent)

    for row in range(2):
        z, a, nearest = logits[row].numpy(), tangent[row].numpy(), radius[row].item()
        assert zeros_counted(z, a, nearest * 0.99) == 0
        assert zeros_counted(z, a, nearest * 1.01) >= 2
