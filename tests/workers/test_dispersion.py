"""What workers' losses and gradients say about each other, against numpy loops and known cases."""

import itertools
import math

import numpy as np
import pytest
import torch

from safestep.workers.dispersion import (
    WorkerDispersion,
    WorkerSums,
    dispersion_from_sums,
    worker_dispersion,
)


def draw_workers(num_workers, num_params=40, *, seed=0, noise=1.0):
    """Return losses [N] and gradients [N, P] of like workers: one gradient plus noise."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(num_params, generator=generator, dtype=torch.float64)
    noises = torch.randn(num_workers, num_params, generator=generator, dtype=torch.float64)
    losses = 1 + 0.1 * torch.randn(num_workers, generator=generator, dtype=torch.float64)
    return losses, shared + noise * noises


def by_hand(losses, gradients):
    """Return the metrics as a dict, by loops over workers and pairs."""
    mean = gradients.mean(0)
    norms = np.array([np.linalg.norm(g) for g in gradients])

    def cosine(a, b):
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    pairs = list(itertools.combinations(gradients, 2))
    between = np.sum((gradients - mean) ** 2) / (len(gradients) - 1)  # tr(S), workers' batches
    return {
        "loss_std": losses.std(),
        "loss_range": np.ptp(losses),
        "grad_norm_std": norms.std(),
        "grad_norm_cv": norms.std() / norms.mean(),
        "pairwise_cosine": np.mean([cosine(a, b) for a, b in pairs]),
        "cosine_to_mean": np.array([cosine(g, mean) for g in gradients]),
        "noise_scale": between / (mean @ mean - between / len(gradients)),
    }


def assert_same(actual: WorkerDispersion, expected: WorkerDispersion, **tolerance):
    for name in WorkerDispersion.__slots__[:-1]:
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name), equal_nan=True, **tolerance
        )
    assert actual.outlier == expected.outlier


@pytest.mark.parametrize("num_workers", [2, 3, 8])
def test_metrics_equal_numpy_loops_over_workers_and_pairs(num_workers):
    losses, gradients = draw_workers(num_workers)

    result = worker_dispersion(losses, gradients)

    for name, value in by_hand(losses.numpy(), gradients.numpy()).items():
        np.testing.assert_allclose(getattr(result, name).numpy(), value, rtol=1e-10, err_msg=name)


def test_dicts_equal_stacked_rows():
    losses, gradients = draw_workers(3)
    dicts = [{"weight": g[:30].reshape(5, 6), "bias": g[30:]} for g in gradients]

    assert_same(worker_dispersion(losses, dicts), worker_dispersion(losses, gradients))


def test_order_of_names_in_dicts_does_not_matter():
    losses, gradients = draw_workers(2)
    dicts = [{"a": gradients[0, :9], "b": gradients[0, 9:]}]
    dicts.append({"b": gradients[1, 9:], "a": gradients[1, :9]})

    assert_same(worker_dispersion(losses, dicts), worker_dispersion(losses, gradients))


def test_long_gradients_are_summed_over_chunks(monkeypatch):
    losses, gradients = draw_workers(3)
    whole = worker_dispersion(losses, gradients)
    monkeypatch.setattr("safestep.workers.dispersion.CHUNK_ELEMENTS", 7)

    assert_same(worker_dispersion(losses, gradients), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_input_is_reduced_in_float64(dtype):
    losses, gradients = draw_workers(4)
    gradients = gradients.to(dtype)

    result = worker_dispersion(losses, gradients)

    assert_same(result, worker_dispersion(losses, gradients.double()))
    assert result.pairwise_cosine.dtype == torch.float64


def test_losses_may_be_plain_numbers_or_carry_a_graph():
    losses, gradients = draw_workers(3)
    expected = worker_dispersion(losses, gradients)

    assert_same(worker_dispersion(losses.tolist(), gradients), expected)
    with_graph = worker_dispersion(losses.requires_grad_(), gradients)
    assert_same(with_graph, expected)
    assert not with_graph.loss_std.requires_grad


@pytest.mark.parametrize("gradient", [[3.0, 4.0], [0.1, 0.7], [1e-20, 3e-20]], ids=str)
def test_one_worker_has_no_dispersion_and_no_pairwise_cosine(gradient):
    result = worker_dispersion([2.0], torch.tensor([gradient]))

    assert (result.loss_std, result.loss_range, result.grad_norm_std, result.grad_norm_cv) == (
        (0.0,) * 4
    )
    torch.testing.assert_close(result.cosine_to_mean.item(), 1.0)
    assert result.pairwise_cosine.isnan()
    assert result.noise_scale.isnan()
    assert result.outlier is None


def test_identical_workers_agree_entirely():
    result = worker_dispersion([0.5] * 4, torch.ones(4, 10))

    assert result.grad_norm_cv == 0
    assert result.noise_scale == 0
    torch.testing.assert_close(result.pairwise_cosine.item(), 1.0)
    torch.testing.assert_close(result.cosine_to_mean, torch.ones(4, dtype=torch.float64))
    assert result.outlier is None


def test_opposed_workers_have_no_gradient_above_the_noise():
    result = worker_dispersion([1.0, 1.0], torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))

    assert result.pairwise_cosine == -1
    assert result.noise_scale == math.inf
    assert result.cosine_to_mean.isnan().all()  # the mean has no direction


def test_scale_of_one_worker_changes_its_weight_in_the_mean_but_not_the_pairwise_cosine():
    losses, gradients = draw_workers(3)
    scaled = gradients * torch.tensor([[1.0], [100.0], [1.0]])

    before, after = worker_dispersion(losses, gradients), worker_dispersion(losses, scaled)

    torch.testing.assert_close(after.pairwise_cosine, before.pairwise_cosine)
    assert after.cosine_to_mean[1] > 0.99 > before.cosine_to_mean[1]


def test_noise_scale_is_the_variance_over_the_squared_gradient_in_examples():
    """64 examples a worker, unit variance per example and coordinate: tr(S)/|G|^2 = P / |G|^2."""
    generator = torch.Generator().manual_seed(1)
    gradient = torch.full((2000,), 0.3, dtype=torch.float64)
    noise = torch.randn(64, 2000, generator=generator, dtype=torch.float64) / 8
    expected = 2000 / (0.3**2 * 2000)

    result = worker_dispersion(torch.ones(64), gradient + noise, num_examples=64)

    # The estimate's own relative error: about sqrt(2 / (N P)) from tr(S), 2 % from |G|^2.
    torch.testing.assert_close(result.noise_scale.item(), expected, rtol=0.05, atol=0)


def test_metrics_follow_from_sums_alone():
    losses, gradients = draw_workers(4)
    mean = gradients.mean(0)
    unit_sum = torch.nn.functional.normalize(gradients, dim=1).sum(0)
    sums = WorkerSums(gradients.square().sum(1), gradients @ mean, mean @ mean, unit_sum @ unit_sum)

    assert_same(dispersion_from_sums(losses, sums), worker_dispersion(losses, gradients))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("num_workers", [2, 3, 8])
def test_a_non_finite_worker_is_the_outlier_and_is_not_hidden(value, where, num_workers):
    losses, gradients = draw_workers(num_workers)
    target = losses if where == "loss" else gradients[:, 0]
    target[1] = value

    result = worker_dispersion(losses, gradients)

    assert result.outlier == 1
    hidden = result.loss_std if where == "loss" else result.pairwise_cosine
    assert not hidden.isfinite()


def test_nobody_stands_out_where_nobody_is_finite():
    assert worker_dispersion([math.nan] * 3, torch.ones(3, 2)).outlier is None


@pytest.mark.parametrize("num_workers", [4, 8, 64])
@pytest.mark.parametrize(
    "fault",
    [
        lambda losses, gradients: (losses, gradients.index_fill(0, torch.tensor(2), 0)),
        lambda losses, gradients: (losses + 20 * torch.eye(len(losses))[2], gradients),
        lambda losses, gradients: (losses, gradients * (1 + 99 * torch.eye(len(losses))[:, 2:3])),
        lambda losses, gradients: (losses, gradients * (1 - 2 * torch.eye(len(losses))[:, 2:3])),
    ],
    ids=["no gradient", "loss", "scaled gradient", "reversed gradient"],
)
def test_a_worker_unlike_all_others_is_the_outlier(fault, num_workers):
    losses, gradients = fault(*draw_workers(num_workers, 1000, noise=0.3))

    assert worker_dispersion(losses, gradients).outlier == 2


def test_two_finite_workers_cannot_say_who_is_the_odd_one():
    assert worker_dispersion([1.0, 100.0], torch.tensor([[1.0], [-50.0]])).outlier is None


@pytest.mark.parametrize("num_workers", [3, 4, 8, 32])
def test_like_workers_rarely_have_an_outlier(num_workers):
    calls = 300
    found = sum(
        worker_dispersion(*draw_workers(num_workers, seed=seed)).outlier is not None
        for seed in range(calls)
    )

    # 1 % is the design; five of 300 more than the mean is under three standard deviations.
    assert found <= 0.01 * calls + 5


def test_empty_gradients_are_refused():
    with pytest.raises(ValueError, match=r"`gradients` of shape \[N, P\].* got shape \(2, 0\)"):
        worker_dispersion([1.0, 1.0], torch.ones(2, 0))
    with pytest.raises(ValueError, match="at least one worker and one parameter"):
        worker_dispersion([], [])


def test_workers_with_other_names_are_refused():
    with pytest.raises(ValueError, match="same names for every worker"):
        worker_dispersion([1.0, 1.0], [{"a": torch.ones(1)}, {"b": torch.ones(1)}])


def test_losses_of_another_number_of_workers_are_refused():
    with pytest.raises(ValueError, match=r"`losses` of shape \(2,\).*got shape \(3,\)"):
        worker_dispersion([1.0, 1.0, 1.0], torch.ones(2, 3))
