"""For every loss: the radius that is measured lies within that of the loss's own Taylor series.

The reference knows nothing of softmax radii. It evaluates the loss at complex points on rays from
0, continues logarithms along each ray, and looks for the first circle on which the loss is not the
boundary value of an analytic function: its Fourier coefficients of negative order do not vanish.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from safestep import SafeStep

pytestmark = pytest.mark.filterwarnings("ignore:SafeStep. the loss holds a quotient")
ROWS, FEATURES, CLASSES = 4, 3, 5
ANGLES, CIRCLES = 1024, 100
RESOLUTION = 1.05  # circles are 3 % apart, and a singularity shows 2 % before its circle

_random = torch.Generator().manual_seed(5)
INPUTS = torch.randn(ROWS, FEATURES, generator=_random, dtype=torch.float64)
LABELS = torch.tensor([0, 3, 1, 4])
REJECTED = torch.tensor([1, 0, 2, 2])
SOFT = torch.randn(ROWS, CLASSES, generator=_random, dtype=torch.float64).softmax(-1)
MULTI = (SOFT > 0.2).double()
WEIGHT = torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0], dtype=torch.float64)
TEMPERATURES = torch.tensor([[0.5], [1.0], [2.0], [4.0]], dtype=torch.float64)


@dataclass(frozen=True)
class Entry:
    """A loss of logits, the same loss at complex logits, and the rows that enter its softmax."""

    name: str
    loss: Callable[[Tensor], Tensor]
    at_complex: Callable[[np.ndarray], np.ndarray]
    rows: Callable[[Tensor], list[Tensor]]

    def __str__(self) -> str:
        return self.name


def log_sum_exp(z: np.ndarray) -> np.ndarray:
    """Continue log sum exp along the rays (axis 1), from where it is next to real."""
    shift = z.mean(-1, keepdims=True)
    top = (z - shift).real.max(-1, keepdims=True)
    total = np.exp(z - shift - top).sum(-1)
    argument = np.unwrap(np.angle(total), axis=1)
    return np.log(np.abs(total)) + 1j * argument + (top + shift)[..., 0]


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - log_sum_exp(z)[..., None]


def softplus(z: np.ndarray) -> np.ndarray:
    return log_sum_exp(np.stack([np.zeros_like(z), z], -1))


def of(labels: Tensor, z: np.ndarray) -> np.ndarray:
    return z[..., np.arange(ROWS), labels.numpy()]


def of_label(z: Tensor, labels: Tensor = LABELS) -> Tensor:
    return z.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def comp_sum(z: Tensor) -> Tensor:
    others = z.scatter(-1, LABELS.unsqueeze(-1), -math.inf).logsumexp(-1)
    return functional.softplus(others - of_label(z)).mean()


def clip_symmetric(z: Tensor) -> Tensor:
    pairs, target = z[:, :ROWS], torch.arange(ROWS)
    return functional.cross_entropy(pairs, target) + functional.cross_entropy(pairs.T, target)


def clip_symmetric_at_complex(z: np.ndarray) -> np.ndarray:
    pairs = z[..., :ROWS]
    both = log_softmax(pairs) + np.swapaxes(log_softmax(np.swapaxes(pairs, -1, -2)), -1, -2)
    return -np.trace(both, axis1=-2, axis2=-1)


def dice(z: Tensor) -> Tensor:
    probability, truth = z.softmax(-1), functional.one_hot(LABELS, CLASSES)
    overlap = (probability * truth).sum(0)
    return 1 - (2 * overlap + 1).div(probability.sum(0) + truth.sum(0) + 1).mean()


def dice_at_complex(z: np.ndarray) -> np.ndarray:
    probability, truth = np.exp(log_softmax(z)), np.eye(CLASSES)[LABELS.numpy()]
    overlap = (probability * truth).sum(-2)
    return -((2 * overlap + 1) / (probability.sum(-2) + truth.sum(-2) + 1)).mean(-1)


ZOO = [
    Entry(
        "hard labels",
        lambda z: functional.cross_entropy(z, LABELS),
        lambda z: -of(LABELS, log_softmax(z)).sum(-1),
        lambda z: [z],
    ),
    Entry(
        "soft labels",
        lambda z: functional.cross_entropy(z, SOFT),
        lambda z: -(SOFT.numpy() * log_softmax(z)).sum((-1, -2)),
        lambda z: [z],
    ),
    Entry(
        "smoothed labels",
        lambda z: functional.cross_entropy(z, LABELS, label_smoothing=0.1),
        lambda z: -(0.9 * of(LABELS, log_softmax(z)) + 0.1 * log_softmax(z).mean(-1)).sum(-1),
        lambda z: [z],
    ),
    Entry(
        "class weights, one of them 0",
        lambda z: functional.cross_entropy(z, LABELS, weight=WEIGHT),
        lambda z: -(WEIGHT[LABELS].numpy() * of(LABELS, log_softmax(z))).sum(-1),
        lambda z: [z[[0, 2, 3]]],
    ),
    Entry(
        "temperature",
        lambda z: functional.cross_entropy(z / 0.5, LABELS),
        lambda z: -of(LABELS, log_softmax(z / 0.5)).sum(-1),
        lambda z: [z / 0.5],
    ),
    Entry(
        "nll of log_softmax",
        lambda z: functional.nll_loss(z.log_softmax(-1), LABELS),
        lambda z: -of(LABELS, log_softmax(z)).sum(-1),
        lambda z: [z],
    ),
    Entry(
        "binary cross-entropy, several labels",
        lambda z: functional.binary_cross_entropy_with_logits(z, MULTI),
        lambda z: (softplus(z) - MULTI.numpy() * z).sum((-1, -2)),
        lambda z: [torch.stack((torch.zeros_like(z), z), -1)],
    ),
    Entry(
        "focal",
        lambda z: -((1 - of_label(z.softmax(-1))) ** 2 * of_label(z.log_softmax(-1))).mean(),
        lambda z: (
            -((1 - np.exp(of(LABELS, log_softmax(z)))) ** 2 * of(LABELS, log_softmax(z))).sum(-1)
        ),
        lambda z: [z],
    ),
    Entry(
        "generalised cross-entropy",
        lambda z: (1 - of_label(z.softmax(-1)) ** 0.7).mean() / 0.7,
        lambda z: -np.exp(0.7 * of(LABELS, log_softmax(z))).sum(-1),
        lambda z: [z],
    ),
    Entry(
        "mean absolute error of probabilities",
        lambda z: (z.softmax(-1) - functional.one_hot(LABELS, CLASSES)).abs().sum(-1).mean(),
        lambda z: -np.exp(of(LABELS, log_softmax(z))).sum(-1),
        lambda z: [z],
    ),
    Entry(
        "distillation with a temperature",
        lambda z: functional.kl_div(
            (z / 3).log_softmax(-1), (SOFT.log() / 3).softmax(-1), reduction="batchmean"
        ),
        lambda z: -(SOFT.numpy() ** (1 / 3) * log_softmax(z / 3)).sum((-1, -2)),
        lambda z: [z / 3],
    ),
    Entry(
        "contrastive, both ways",
        clip_symmetric,
        clip_symmetric_at_complex,
        lambda z: [z[:, :ROWS], z[:, :ROWS].T],
    ),
    Entry(
        "entropy",
        lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
        lambda z: -(np.exp(log_softmax(z)) * log_softmax(z)).sum((-1, -2)),
        lambda z: [z],
    ),
    Entry(
        "a temperature of its own for each example",
        lambda z: (TEMPERATURES[:, 0] * (z / TEMPERATURES).logsumexp(-1) - of_label(z)).mean(),
        lambda z: (TEMPERATURES[:, 0].numpy() * log_sum_exp(z / TEMPERATURES.numpy())).sum(-1),
        lambda z: [z / TEMPERATURES],
    ),
    Entry(
        "cross-entropy and dice",
        lambda z: functional.cross_entropy(z, LABELS) + dice(z),
        lambda z: -of(LABELS, log_softmax(z)).sum(-1) + dice_at_complex(z),
        lambda z: [z],
    ),
]
# Losses of a function of several softmaxes: what enters the last one is not linear in the logits.
NESTED = [
    Entry(
        "logistic loss of a log-sum-exp",
        comp_sum,
        lambda z: -of(LABELS, log_softmax(z)).sum(-1),
        lambda z: [z],
    ),
    Entry(
        "preference of one answer",
        lambda z: (
            -functional.logsigmoid(
                of_label(z.log_softmax(-1)) - of_label(z.log_softmax(-1), REJECTED)
            ).mean()
        ),
        lambda z: softplus(of(REJECTED, z) - of(LABELS, z)).sum(-1),
        lambda z: [z],
    ),
    Entry(
        "preference of one sequence",
        lambda z: (
            -functional.logsigmoid(
                of_label(z.log_softmax(-1)) @ torch.tensor([1.0, 1.0, -1.0, -1.0]).double()
            )
        ),
        lambda z: softplus(of(LABELS, log_softmax(z)) @ np.array([-1.0, -1.0, 1.0, 1.0])),
        lambda z: [z],
    ),
]


def step(entry: Entry, how: str, radius: str = "bound") -> tuple[SafeStep, Tensor, Tensor]:
    """Take a step and return the guard, the logits before it and the way that the step led them."""
    model = nn.Linear(FEATURES, CLASSES, bias=False, dtype=torch.float64)
    nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(11))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard = SafeStep(optimizer, model, action="monitor", radius=radius)
    before = model(INPUTS).detach()
    if how == "record":
        guard.record(lambda: entry.loss(model(INPUTS)))
    entry.loss(model(INPUTS)).backward()
    optimizer.step()
    return guard, before, model(INPUTS).detach() - before


@cache
def nearest_singularity(entry: Entry) -> float:
    """Return the distance to the singularity of the loss along the step, in steps, from below."""
    _, logits, tangent = (each for each in step(entry, "record"))
    spread = max(float((row.amax(-1) - row.amin(-1)).max()) for row in entry.rows(tangent))
    distance = math.pi / spread * np.geomspace(0.2, 8, CIRCLES)
    # The other half plane holds the complex conjugates.
    angle = np.linspace(0, math.pi, ANGLES // 2 + 1)
    t = distance * np.exp(1j * angle)[:, None]
    half = entry.at_complex(logits.numpy() + tangent.numpy() * t[..., None, None])
    circle = np.concatenate([half, half[-2:0:-1].conj()])
    coefficients = np.abs(np.fft.fft(circle, axis=0))
    negative = coefficients[ANGLES * 3 // 4 :].max(0)
    is_analytic = negative < 1e-6 * coefficients.max(0)
    assert is_analytic[0]
    return math.inf if is_analytic.all() else float(distance[is_analytic.argmin()])


@pytest.mark.parametrize("entry", ZOO, ids=str)
def test_guard_measures_the_rows_that_enter_the_softmax_of_a_recorded_loss(entry):
    guard, _, tangent = step(entry, "record")

    spread = max(float((row.amax(-1) - row.amin(-1)).max()) for row in entry.rows(tangent))
    assert guard.last.status == "ok"
    assert guard.last.normalized_step == pytest.approx(spread / math.pi, rel=1e-9)


@pytest.mark.parametrize("radius", ["bound", "certified"])
@pytest.mark.parametrize("entry", ZOO + NESTED, ids=str)
def test_measured_radius_is_within_the_nearest_singularity_of_the_loss(entry, radius):
    guard, _, _ = step(entry, "record", radius)

    assert 1 / guard.last.normalized_step <= RESOLUTION * nearest_singularity(entry)


@pytest.mark.filterwarnings("ignore:SafeStep. a step was not measured")
@pytest.mark.filterwarnings("ignore:SafeStep. output.*(taken for the logits|pushed away)")
@pytest.mark.parametrize("entry", ZOO + NESTED, ids=str)
def test_a_loss_outside_the_model_is_measured_within_its_singularity_or_not_at_all(entry):
    guard, _, _ = step(entry, "loop")

    if guard.last.status == "unmeasured":
        assert "logits=" in guard.last.reason
    else:
        assert 1 / guard.last.normalized_step <= RESOLUTION * nearest_singularity(entry)
