"""The predicted change of the loss against the loss itself at linearised logits, in float64."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from safestep import SafeStep

_random = torch.Generator().manual_seed(3)
LABELS = torch.randint(0, 4, (12,), generator=_random)
IGNORED = LABELS.clone()
IGNORED[[3, 7]] = -100
CLASS_WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0])
ROW_WEIGHT = torch.rand(12, generator=_random)
SOFT = torch.randn(12, 4, generator=_random).softmax(-1)
MANY = (torch.rand(12, 4, generator=_random) > 0.5).float()
TOLERANCE = 1e-3


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 8)
        self.norm = nn.LayerNorm(8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        h = self.embedding(x)
        h = h + self.attend(self.norm(h), self.norm(h), self.norm(h), need_weights=False)[0]
        return functional.linear(h, self.embedding.weight).flatten(0, 1)


def _features(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)), _features(12, 5)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64, 4),
        ),
        _features(12, 1, 6, 6),
    ),
    "normed": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 4)),
        _features(12, 5),
    ),
    "linear": (lambda: nn.Linear(5, 4), _features(12, 5)),
    "tied language model": (Tied, LABELS.view(3, 4)),
}
# The gradient at the output shows the weights and labels of these.
LOSSES = {
    "cross-entropy": lambda z: functional.cross_entropy(z, LABELS),
    "ignored rows": lambda z: functional.cross_entropy(z, IGNORED),
    "class weights": lambda z: functional.cross_entropy(z, LABELS, CLASS_WEIGHT.to(z)),
    "smoothed": lambda z: functional.cross_entropy(z, IGNORED, label_smoothing=0.1),
    "temperature": lambda z: functional.cross_entropy(z / 2, LABELS),
    "row weights": lambda z: (
        (functional.cross_entropy(z, LABELS, reduction="none") * ROW_WEIGHT).sum()
        / ROW_WEIGHT.sum()
    ),
    "log-probabilities": lambda z: functional.nll_loss(z.log_softmax(-1), IGNORED),
    "sigmoid rows": lambda z: functional.binary_cross_entropy_with_logits(z, MANY.to(z)),
    "softplus": lambda z: functional.softplus(z * (1 - 2 * MANY.to(z))).mean(),
}
# Of these only the loss function itself.
SEEN_LOSSES = LOSSES | {
    "soft labels": lambda z: functional.cross_entropy(z, SOFT.to(z), label_smoothing=0.1),
    "soft sigmoid rows": lambda z: functional.binary_cross_entropy_with_logits(z, SOFT.to(z)),
    "divergence": lambda z: functional.kl_div(z.log_softmax(-1), SOFT.to(z), reduction="batchmean"),
    "sum over rows": lambda z: functional.cross_entropy(z, IGNORED, reduction="sum") / 10,
    "two heads": lambda z: (
        functional.cross_entropy(z[:, :2], LABELS % 2)
        + 0.25 * functional.cross_entropy(z[:, 2:], LABELS // 2)
    ) / 1.25,
    "policy by hand": lambda z: -(
        z.log_softmax(-1).gather(-1, LABELS.unsqueeze(-1)).squeeze(-1) * ROW_WEIGHT
    ).sum() / ROW_WEIGHT.sum(),
}  # fmt: skip


class Reference:
    """The model in float64 at the start of a step."""

    def __init__(self, model):
        self.twin = copy.deepcopy(model).double()
        self.start = {name: p.detach().clone() for name, p in self.twin.named_parameters()}

    def change(self, model, inputs, loss):
        """Return slope and divergence of the loss along the update that `model` has made."""
        update = {n: p.detach().double() - self.start[n] for n, p in model.named_parameters()}
        inputs = inputs.double() if inputs.is_floating_point() else inputs

        def logits(params):
            return torch.func.functional_call(self.twin, params, (inputs,))

        with sdpa_kernel(SDPBackend.MATH):
            z, a = torch.func.jvp(logits, (self.start,), (update,))
        _, slope = torch.func.jvp(loss, (z,), (a,))
        return float(slope), float(loss(z + a) - loss(z) - slope)


def stepped(model, inputs, loss, *, tells=False, lr=0.5, **options):
    """Return the report of a step, and its reference."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    reference = Reference(model)
    with SafeStep(optimizer, model, max_normalized_step=1e9, **options) as guard:

        def step(x):
            return loss(model(x))

        if tells:
            guard.record(step, inputs)
        step(inputs).backward()
        optimizer.step()
        return guard.last, reference.change(model, inputs, loss)


def assert_predicted(report, expected):
    slope, divergence = expected
    assert report.loss_reason is None
    assert report.loss_slope == pytest.approx(slope, rel=TOLERANCE)
    assert report.divergence == pytest.approx(divergence, rel=TOLERANCE)
    assert report.predicted_change == pytest.approx(slope + divergence, rel=2 * TOLERANCE)


@pytest.mark.parametrize("tells", [False, True], ids=["output", "whole step"])
@pytest.mark.parametrize("name", MODELS)
def test_five_models_change_their_loss_as_predicted(name, tells):
    make, inputs = MODELS[name]
    torch.manual_seed(0)

    assert_predicted(*stepped(make(), inputs, LOSSES["ignored rows"], tells=tells, estimator="jvp"))


@pytest.mark.filterwarnings("ignore:SafeStep. output is taken for the logits")
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_at_an_output_shows_weights_and_labels(name):
    make, inputs = MODELS["mlp"]
    torch.manual_seed(1)

    assert_predicted(*stepped(make(), inputs, LOSSES[name], lr=3.0, estimator="jvp"))


@pytest.mark.parametrize("name", SEEN_LOSSES)
def test_a_loss_that_is_seen_tells_weights_and_labels(name):
    make, inputs = MODELS["mlp"]
    torch.manual_seed(1)

    report, expected = stepped(
        make(), inputs, SEEN_LOSSES[name], lr=3.0, tells=True, estimator="jvp"
    )

    assert_predicted(report, expected)


def test_a_secant_finds_the_change_of_the_loss_itself():
    make, inputs = MODELS["mlp"]
    torch.manual_seed(1)
    model = make()
    before = LOSSES["cross-entropy"](model(inputs)).item()

    report, _ = stepped(model, inputs, LOSSES["cross-entropy"], estimator="secant")

    after = LOSSES["cross-entropy"](model(inputs)).item()
    assert report.predicted_change == pytest.approx(after - before, rel=TOLERANCE)


def test_positive_weights_count_in_the_mean():
    make, inputs = MODELS["mlp"]
    torch.manual_seed(1)
    weight = ((1 - MANY) + CLASS_WEIGHT * MANY).mean()

    report, (slope, divergence) = stepped(
        make(), inputs, tells=True, estimator="jvp",
        loss=lambda z: functional.binary_cross_entropy_with_logits(
            z, MANY.to(z), pos_weight=CLASS_WEIGHT.to(z)
        ),
    )  # fmt: skip

    assert_predicted(report, (slope / float(weight), divergence / float(weight)))


@pytest.mark.parametrize("factor", [2.0**16, 1 / 8], ids=["loss scale", "share of a batch"])
def test_a_factor_of_the_whole_loss_is_left_out(factor):
    make, inputs = MODELS["mlp"]
    torch.manual_seed(1)

    report, (slope, divergence) = stepped(
        make(), inputs, lambda z: factor * functional.cross_entropy(z, IGNORED),
        lr=0.5 / factor, estimator="jvp",
    )  # fmt: skip

    assert_predicted(report, (slope / factor, divergence / factor))


@pytest.mark.parametrize("tells", [False, True], ids=["output", "whole step"])
def test_micro_batches_of_different_size_weigh_as_in_the_loss(tells):
    make, inputs = MODELS["normed"]
    torch.manual_seed(1)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    reference = Reference(model)

    def step(x, labels):
        return functional.cross_entropy(model(x), labels)

    with SafeStep(optimizer, model, max_normalized_step=1e9, estimator="jvp") as guard:
        for part in (slice(0, 4), slice(4, 12)):
            if tells:
                guard.record(step, inputs[part], LABELS[part])
            (step(inputs[part], LABELS[part]) / 2).backward()
        optimizer.step()

        def halves(z):
            first = functional.cross_entropy(z[:4], LABELS[:4])
            return (first + functional.cross_entropy(z[4:], LABELS[4:])) / 2

        assert_predicted(guard.last, reference.change(model, inputs, halves))


def test_rows_that_are_fitted_perfectly_weigh_as_the_others():
    """In float32 their gradient is rounding, or nothing."""
    make, inputs = MODELS["linear"]
    torch.manual_seed(1)
    model = make()
    with torch.no_grad():
        model.weight *= 40
    labels = model(inputs).argmax(-1)
    labels[:4] = (labels[:4] + 1) % 4

    report, expected = stepped(
        model, inputs, lambda z: functional.cross_entropy(z, labels), lr=0.1, estimator="jvp"
    )

    assert_predicted(report, expected)


def test_a_fused_head_is_predicted_tile_by_tile(monkeypatch):
    monkeypatch.setattr("safestep.capture.fused_logits.TILE_ELEMENTS", 16)
    torch.manual_seed(1)
    inputs = _features(12, 5)
    body, head = nn.Linear(5, 6), nn.Linear(6, 4, bias=False)
    model = nn.Sequential(body, head)
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    reference = Reference(model)

    def step(x):
        return functional.linear_cross_entropy(
            body(x), head.weight, IGNORED, ignore_index=-100, label_smoothing=0.1
        )

    with SafeStep(optimizer, model, max_normalized_step=1e9, estimator="jvp") as guard:
        guard.record(step, inputs)
        step(inputs).backward()
        optimizer.step()

        assert_predicted(guard.last, reference.change(model, inputs, LOSSES["smoothed"]))


@pytest.mark.filterwarnings("ignore:SafeStep. output is taken for the logits")
@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda z: functional.cross_entropy(z, SOFT), "one label in each row"),
        (lambda z: (z.softmax(-1) - SOFT).square().sum(), "one label in each row"),
    ],
    ids=["soft labels", "squares of probabilities"],
)
def test_where_the_weights_do_not_show_the_slope_is_not_guessed(loss, reason):
    make, inputs = MODELS["mlp"]
    torch.manual_seed(1)

    report, _ = stepped(make(), inputs, loss, estimator="jvp")

    assert math.isnan(report.loss_slope)
    assert math.isnan(report.predicted_change)
    assert report.divergence > 0
    assert reason in report.loss_reason


def test_policy_gradients_of_either_sign_have_a_divergence_but_no_slope():
    make, inputs = MODELS["mlp"]
    torch.manual_seed(1)
    advantage = ROW_WEIGHT - ROW_WEIGHT.mean()

    report, _ = stepped(
        make(), inputs, tells=True, estimator="jvp",
        loss=lambda z: (
            functional.cross_entropy(z, LABELS, reduction="none") * advantage.to(z)
        ).mean(),
    )  # fmt: skip

    assert math.isnan(report.loss_slope)
    assert report.divergence > 0
    assert "negative weight" in report.loss_reason


def test_a_predicted_step_has_neither():
    make, inputs = MODELS["mlp"]
    torch.manual_seed(1)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with SafeStep(optimizer, model) as guard:
        for _ in range(20):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), LABELS).backward()
            optimizer.step()
            if guard.last.estimator == "predicted":
                break

        assert guard.last.estimator == "predicted"
        assert math.isnan(guard.last.divergence)
        assert guard.last.loss_reason is None
