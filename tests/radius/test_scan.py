"""The premises that make the scan of the strip bound rigorous."""

import math

import numpy as np
import pytest
import torch

from safestep.radius.scan import dominated_interval, scan_minimum, tilted_moments


def unit_rows(num_rows, num_classes, scale, seed=0):
    """Log-weights and slopes that reach both ends of [0, 1], float64."""
    rng = np.random.default_rng(seed)
    log_weight = scale * rng.normal(size=(num_rows, num_classes))
    slope = rng.random(size=(num_rows, num_classes)) ** rng.choice([0.1, 1, 10], size=(num_rows, 1))
    slope[:, 0], slope[:, 1] = 0, 1
    return torch.tensor(log_weight), torch.tensor(slope)


@pytest.mark.parametrize("num_classes", [2, 3, 20])
@pytest.mark.parametrize("scale", [0.0, 2.0, 10.0])
def test_logarithm_of_the_strip_bound_bends_down_by_a_quarter_at_most(num_classes, scale):
    """Second differences of w = log(x^2 + pi^2 / (4 s^2)), with s^2 from plain numpy."""
    log_weight, slope = (each.numpy()[:, None] for each in unit_rows(50, num_classes, scale))
    step = 0.01
    x = np.arange(-15, 15, step)
    weight = np.exp(log_weight + x[:, None] * slope - 30)
    weight /= weight.sum(axis=-1, keepdims=True)
    mean = (weight * slope).sum(axis=-1, keepdims=True)
    variance = (weight * (slope - mean) ** 2).sum(axis=-1)
    w = np.log(x**2 + np.pi**2 / (4 * variance))

    curvature = np.diff(w, 2) / step**2

    assert curvature.min() >= -0.25 - 1e-6


def test_tilted_moments_are_those_of_the_softmax():
    log_weight, slope = unit_rows(50, 6, scale=2.0)

    mean, log_variance, skew = tilted_moments(log_weight, slope)

    weight = log_weight.softmax(dim=-1)
    expected = (weight * slope).sum(dim=-1)
    deviation = slope - expected.unsqueeze(-1)
    variance = (weight * deviation**2).sum(dim=-1)
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(log_variance, variance.log(), rtol=1e-11, atol=0)
    third = (weight * deviation**3).sum(dim=-1)
    torch.testing.assert_close(skew, third / variance, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tilted_variance_survives_probabilities_below_the_smallest_number(dtype):
    """Two classes at gap g: log variance -g - 2 log(1 + exp(-g))."""
    log_weight = torch.tensor([[0.0, -2e4], [-2e4, 0.0]], dtype=dtype)
    slope = torch.tensor([[0.0, 1.0]], dtype=dtype).expand(2, -1)

    _, log_variance, skew = tilted_moments(log_weight, slope)

    torch.testing.assert_close(log_variance, torch.tensor([-2e4, -2e4], dtype=dtype))
    torch.testing.assert_close(skew, torch.tensor([1.0, -1.0], dtype=dtype))


@pytest.mark.parametrize("num_classes", [3, 20])
def test_dominated_interval_ends_where_the_class_holds_half(num_classes):
    log_weight, slope = unit_rows(200, num_classes, scale=5.0)
    weight, top = log_weight.softmax(dim=-1).max(dim=-1)

    left, right = dominated_interval(log_weight, slope)

    assert ((left == 0) & (right == 0))[weight <= 0.5].all()
    assert ((left < 0) & (right > 0))[weight > 0.5].all()
    for end in (left, right):
        ends = end.isfinite() & (weight > 0.5)
        at_end = (log_weight + end.unsqueeze(-1) * slope)[ends].softmax(dim=-1)
        share = at_end.gather(-1, top[ends].unsqueeze(-1))
        # A far end rounds the exponents, log_weight + end slope, by 1e-16 of itself.
        error = (share.squeeze(-1) - 0.5).abs()
        assert (error <= 1e-15 * (1000 + end[ends].abs())).all()


def test_dominated_interval_is_unbounded_towards_the_extreme_of_its_class():
    log_weight = torch.tensor([[3.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    slope = torch.tensor([[0.0, 1.0, 0.4], [1.0, 0.0, 0.4]])

    left, right = dominated_interval(log_weight, slope)

    assert left[0] == -math.inf
    assert right[1] == math.inf
    assert right[0].isfinite()
    assert left[1].isfinite()


@pytest.mark.parametrize("inside", [True, False])
def test_scan_minimum_of_two_balanced_classes_is_pi(inside):
    log_weight, slope = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])
    zero, ends = torch.zeros(1), torch.full((1,), 2.0)

    if inside:
        radius = scan_minimum(log_weight, slope, -ends, ends, inside=True)
    else:
        radius = scan_minimum(log_weight, slope, zero, zero, inside=False)

    assert math.pi * (1 - 2.5e-3) <= radius.item() <= math.pi * (1 + 1e-6)


def test_scan_of_nothing_is_infinite():
    log_weight, slope = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])
    everything = torch.tensor([math.inf])

    assert scan_minimum(log_weight, slope, -everything, everything, inside=False).item() == math.inf
