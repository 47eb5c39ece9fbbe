"""The slope of the loss by forward mode against that of the gradient, and when there is none."""

import math

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn import functional

from safestep import SafeStep

BATCH = 12


class WithLoss(nn.Module):
    """Returns its own loss beside the logits, the scores of its attention and what they are of."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, inputs, labels):
        hidden = self.body(inputs).tanh()
        logits = self.head(hidden)
        loss = functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits, "hidden": hidden}


def network(dtype=torch.float64):
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 5)).to(dtype)


def batch(dtype=torch.float64):
    return torch.randn(BATCH, 6, dtype=dtype), torch.randint(5, (BATCH,))


def audited(
    model, *, loss=functional.cross_entropy, change=lambda model: None, batches=1, steps=3, **more
):
    """Yield the guard after each step of training, with `change` between backward pass and step."""
    options = {"momentum": 0.9, "lr": 0.05}
    optimizer = torch.optim.SGD(model.parameters(), **options)
    with SafeStep(optimizer, model, estimator="jvp", **more) as guard:
        for _ in range(steps):
            optimizer.zero_grad()
            for _ in range(batches):
                inputs, labels = batch(next(model.parameters()).dtype)
                loss(model(inputs), labels).backward()
            change(model)
            optimizer.step()
            yield guard


def ratios(*args, **options):
    return [guard.last.gradient_ratio for guard in audited(*args, **options)]


def test_the_slopes_are_those_that_a_hand_finds():
    model = nn.Linear(3, 2, bias=False).double()
    inputs = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]]).double()
    labels = torch.tensor([0, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, model, estimator="jvp", logits=lambda output: output)
    seen = []
    measured, agreed = guard._agreement.measurement, guard._agreement
    agreed.measurement = lambda mine, *rest: seen.append(mine) or measured(mine, *rest)
    start = model.weight.detach().clone()

    functional.cross_entropy(model(inputs), labels).backward()
    model.weight.grad *= 0.25
    optimizer.step()

    shares = (inputs @ start.T).softmax(-1)
    gradient = (shares - functional.one_hot(labels)).T @ inputs / 2
    slope = float(-0.1 * 0.25 * gradient.square().sum())
    slopes = seen[0].slopes
    assert slopes.outputs == pytest.approx(slope, rel=1e-12)
    assert slopes.gradient == pytest.approx(0.25 * slope, rel=1e-12)
    assert guard.last.gradient_ratio == pytest.approx(0.25, rel=1e-12)
    assert guard.last.gradient_reason is None


@pytest.mark.parametrize("batches", [1, 3])
def test_the_ratio_of_a_right_gradient_is_one(batches):
    assert ratios(network(), batches=batches) == pytest.approx([1.0] * 3, rel=1e-9)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_rounding_leaves_the_ratio_near_one(dtype, error):
    assert ratios(network(dtype)) == pytest.approx([1.0] * 3, rel=error)


@pytest.mark.parametrize("name", ["residual", "attention-dropout", "recurrent", "cached"])
def test_the_ratio_of_other_models_is_one(name, make_model, make_batch):
    model = make_model(name).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guard = SafeStep(optimizer, model, estimator="jvp")
    for seed in range(3):
        inputs, labels = make_batch(name, seed=seed)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs).flatten(0, -2), labels.flatten()).backward()
        optimizer.step()
        assert guard.last.gradient_ratio == pytest.approx(1.0, rel=1e-4), guard.last


def test_the_ratio_of_a_clipped_gradient_is_the_factor():
    factors = []

    def clip(model):
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        factors.append(0.1 / float(norm + 1e-6))

    assert ratios(network(), change=clip) == pytest.approx(factors, rel=1e-6)


def test_a_gradient_of_micro_batches_that_are_not_divided_is_that_of_their_sum():
    def mean(logits, labels):
        return functional.cross_entropy(logits, labels) / 4

    assert ratios(network(), loss=mean, batches=4) == pytest.approx([1.0] * 3, rel=1e-9)


def test_two_backward_passes_through_one_output_are_added():
    def loss(logits, labels):
        functional.cross_entropy(logits, labels).backward(retain_graph=True)
        return functional.cross_entropy(logits, labels.flip(0))  # backward by the caller

    assert ratios(network(), loss=loss) == pytest.approx([1.0] * 3, rel=1e-9)


def test_the_scale_of_a_grad_scaler_is_divided_out():
    model, scaler = network(torch.float32), GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    guard = SafeStep(optimizer, model, estimator="jvp")
    inputs, labels = batch(torch.float32)

    scaler.scale(functional.cross_entropy(model(inputs), labels)).backward()
    scaler.step(optimizer)

    assert guard.last.gradient_ratio == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("copy", [True, False])
def test_a_fused_optimizer_that_unscales_by_itself_is_right_too(copy):
    model, scaler = network(torch.float32), GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    guard = SafeStep(optimizer, model, estimator="jvp", copy=copy)
    inputs, labels = batch(torch.float32)

    scaler.scale(functional.cross_entropy(model(inputs), labels)).backward()
    scaler.step(optimizer)

    assert guard.last.gradient_ratio == pytest.approx(1.0, rel=1e-4)


def test_a_loss_inside_the_model_counts_once():
    model = WithLoss().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    guard = SafeStep(optimizer, model, estimator="jvp")
    for _ in range(3):
        optimizer.zero_grad()
        model(*batch())["loss"].backward()
        optimizer.step()
        assert guard.last.gradient_ratio == pytest.approx(1.0, rel=1e-9), guard.last


def test_a_recorded_loss_counts_whole_whatever_it_is_made_of():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    guard = SafeStep(optimizer, model, estimator="jvp")

    def step(inputs, labels):
        penalty = sum(param.square().sum() for param in model.parameters())
        return functional.cross_entropy(model(inputs), labels) + 0.01 * penalty

    for _ in range(3):
        optimizer.zero_grad()
        given = batch()
        guard.record(step, *given)
        step(*given).backward()
        optimizer.step()
        assert guard.last.gradient_ratio == pytest.approx(1.0, rel=1e-9)


def test_sparse_gradients_count():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3)

        def forward(self, ids):
            return self.head(self.words(ids).mean(1))

    model = Words().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, model, estimator="jvp")
    ids = torch.tensor([[1, 1, 4], [2, 8, 1]])

    functional.cross_entropy(model(ids), torch.tensor([0, 2])).backward()
    optimizer.step()

    assert guard.last.gradient_ratio == pytest.approx(1.0, rel=1e-9)


def test_a_step_measured_by_difference_says_why_it_has_no_ratio():
    model = network(torch.float32)
    guard = next(iter(audited(model)))
    assert guard.last.estimator == "jvp"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, model, estimator="difference")
    inputs, labels = batch(torch.float32)
    functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()

    assert math.isnan(guard.last.gradient_ratio)
    assert guard.last.gradient_reason == "a finite difference shows no exact slope"


def test_only_an_audited_step_keeps_large_gradients(monkeypatch):
    monkeypatch.setattr("safestep.capture.recorder.ROOM", 2**16)
    model = nn.Linear(4, 512)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, model, estimator="jvp", audit_interval=2)
    found = []
    for _ in range(4):
        optimizer.zero_grad()
        logits = model(torch.randn(256, 4))
        functional.cross_entropy(logits, torch.randint(512, (256,))).backward()
        optimizer.step()
        found.append(guard.last.gradient_ratio)
    kept, *_ = found[2:]

    assert kept == pytest.approx(1.0, rel=1e-3)
    assert math.isnan(found[3])
    assert "was not kept" in guard.last.gradient_reason


def test_audit_interval_measures_exactly_where_nothing_else_asks_for_it():
    model = network(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    guard = SafeStep(optimizer, model, audit_interval=10)
    exact = []
    inputs, labels = batch(torch.float32)
    for step in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        if not math.isnan(guard.last.gradient_ratio):
            exact.append(step)

    assert {20, 30, 40, 50} <= set(exact)
    assert len(exact) < 30


@pytest.mark.parametrize("interval", [0, 1.5, "often"])
def test_audit_interval_is_checked(interval):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`audit_interval` to be a positive integer"):
        SafeStep(optimizer, model, audit_interval=interval)


def test_a_second_optimizer_that_steps_later_is_not_audited():
    model = network()
    optimizers = [torch.optim.SGD(model[place].parameters(), lr=0.1) for place in (0, 3)]
    first, second = (SafeStep(each, model, estimator="jvp") for each in optimizers)
    inputs, labels = batch()

    functional.cross_entropy(model(inputs), labels).backward()
    for optimizer in optimizers:
        optimizer.step()

    assert first.last.gradient_ratio == pytest.approx(1.0, rel=1e-9)
    assert math.isnan(second.last.gradient_ratio)
    assert "another optimizer moved parameters" in second.last.gradient_reason


def test_an_optimizer_that_evaluates_several_gradients_is_not_audited():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    guard = SafeStep(optimizer, model, estimator="jvp")
    inputs, labels = batch()

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
        assert math.isnan(guard.last.gradient_ratio)
        assert "several places in a step" in guard.last.gradient_reason


def test_an_optimizer_that_writes_into_its_gradients_is_not_audited():
    model = network()
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
    optimizer = torch.optim.SGD(model.parameters(), foreach=True, **options)
    guard = SafeStep(optimizer, model, estimator="jvp")
    inputs, labels = batch()
    functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()

    assert math.isnan(guard.last.gradient_ratio)
    assert "changed in place during the step" in guard.last.gradient_reason
