"""A recorded loss that is a user's own Function: its gradient at its arguments shows the logits."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from safestep import SafeStep
from safestep.capture import own_functions
from safestep.capture.losses import LOSS_FUNCTIONS

_random = torch.Generator().manual_seed(0)
INPUTS = torch.randn(8, 5, generator=_random)
LABELS = torch.tensor([0, 3, 1, -100, 2, 2, -100, 1])
COUNTED = LABELS >= 0


@pytest.fixture(autouse=True)
def forgotten():
    known = set(LOSS_FUNCTIONS)
    yield
    for name in LOSS_FUNCTIONS.keys() - known:
        del LOSS_FUNCTIONS[name]
    own_functions._unclear.clear()


class CrossEntropy(torch.autograd.Function):
    """Of logits divided by 2, as one kernel would compute it, with the labels first."""

    @staticmethod
    def forward(ctx, labels, logits, scale=0.5):
        pull = (scale * logits).softmax(-1)
        loss = -pull.log().gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        pull -= functional.one_hot(labels.clamp(min=0), logits.shape[-1])
        ctx.save_for_backward(pull * (labels >= 0).unsqueeze(-1) * scale / (labels >= 0).sum())
        return loss[labels >= 0].mean()

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient * ctx.saved_tensors[0], None


class LinearCrossEntropy(torch.autograd.Function):
    """Of a last layer whose logits are formed a few rows at a time, with gradients at once."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, bias=None, rows=3):
        total, d_hidden, d_weight = hidden.new_zeros(()), hidden * 0, weight * 0
        d_bias = None if bias is None else bias * 0
        count = (labels >= 0).sum()
        for part in torch.arange(len(hidden)).split(rows):
            logits = functional.linear(hidden[part], weight, bias)
            label, counts = labels[part].clamp(min=0), (labels[part] >= 0).unsqueeze(-1)
            pull = logits.softmax(-1) - functional.one_hot(label, len(weight))
            pull = pull * counts / count
            loss = functional.cross_entropy(logits, label, reduction="none")
            total = total + (loss * counts.squeeze(-1)).sum() / count
            d_hidden[part] = pull @ weight
            d_weight += pull.T @ hidden[part]
            if d_bias is not None:
                d_bias += pull.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    def backward(ctx, gradient):
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        d_bias = None if d_bias is None else gradient * d_bias
        return gradient * d_hidden, gradient * d_weight, None, d_bias, None


class SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.square().mean()

    @staticmethod
    def backward(ctx, gradient):
        (logits,) = ctx.saved_tensors
        return gradient * 2 * logits / logits.numel()


def network(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4, bias=bias))


def of_logits(model):
    return CrossEntropy.apply(LABELS, model(INPUTS))


def of_a_last_layer(model):
    last = model[-1]
    return LinearCrossEntropy.apply(model[:-1](INPUTS), last.weight, LABELS, last.bias)


CASES = {
    "logits": (of_logits, True, 0.5, "CrossEntropy"),
    "last layer": (of_a_last_layer, True, 1.0, "LinearCrossEntropy"),
    "last layer without bias": (of_a_last_layer, False, 1.0, "LinearCrossEntropy"),
}


@pytest.mark.parametrize("estimator", ["auto", "jvp"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:SafeStep. .*has no forward-mode derivative")
def test_the_logits_of_an_own_function_are_measured_by_difference(case, estimator):
    loss, bias, scale, _ = CASES[case]
    model, twin = network(bias), network(bias)
    guard = SafeStep(torch.optim.SGD(model.parameters(), 0.1), model, estimator=estimator)
    plain = torch.optim.SGD(twin.parameters(), 0.1)
    for _ in range(4):
        before = copy.deepcopy(model)
        guard.record(loss, model)
        for optimizer, each in ((guard.optimizer, model), (plain, twin)):
            optimizer.zero_grad()
            loss(each).backward()
            optimizer.step()
        assert guard.last.estimator.startswith("difference")
        assert guard.last.normalized_step == pytest.approx(expected(before, model, scale), rel=5e-3)

    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_the_own_function_is_named(case):
    loss, bias, _, name = CASES[case]
    model = network(bias)
    guard = SafeStep(torch.optim.SGD(model.parameters(), 0.1), model)

    guard.record(loss, model)
    loss(model).backward()
    with pytest.warns(UserWarning, match=f"{name}.*has no forward-mode derivative"):
        guard.optimizer.step()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:SafeStep. .*has no forward-mode derivative")
def test_a_step_too_long_is_clipped_to_the_limit(case):
    loss, bias, scale, _ = CASES[case]
    model = network(bias)
    guard = SafeStep(torch.optim.SGD(model.parameters(), 100.0), model)
    before = copy.deepcopy(model)
    guard.record(loss, model)
    loss(model).backward()
    guard.optimizer.step()

    assert guard.last.status == "clipped"
    assert expected(before, model, scale) == pytest.approx(1, rel=5e-3)


@pytest.mark.filterwarnings("ignore:SafeStep. a step was not measured")
def test_an_own_function_of_another_kind_is_named_as_the_obstacle():
    model = network()
    guard = SafeStep(torch.optim.SGD(model.parameters(), 0.1), model)
    for _ in range(2):
        guard.record(lambda: SquaredError.apply(model(INPUTS)))
        SquaredError.apply(model(INPUTS)).backward()
        guard.optimizer.step()
        assert guard.last.status == "unmeasured"
        assert "SquaredError" in guard.last.reason


class Variant(torch.autograd.Function):
    """Cross-entropy with a label that does not count, smoothing, and a cap on the logits."""

    @staticmethod
    def forward(ctx, logits, labels, ignored, smoothing, cap):
        with torch.enable_grad():
            inner = logits.detach().requires_grad_()
            capped = inner if cap is None else cap * torch.tanh(inner / cap)
            loss = functional.cross_entropy(
                capped, labels, ignore_index=ignored, label_smoothing=smoothing
            )
            ctx.save_for_backward(*torch.autograd.grad(loss, inner))
        return loss.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None, None, None, None


@pytest.mark.parametrize(
    ("ignored", "smoothing", "cap"),
    [(-100, 0.0, None), (3, 0.0, None), (3, 0.1, None), (-100, 0.1, None), (3, 0.0, 3.0),
     (-100, 0.1, 3.0)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:SafeStep")
def test_an_own_function_is_measured_right_or_not_at_all(ignored, smoothing, cap):
    torch.manual_seed(0)
    model = nn.Linear(5, 4)
    guard = SafeStep(torch.optim.SGD(model.parameters(), 0.02), model)
    labels = LABELS if ignored < 0 else torch.tensor([0, 3, 1, 3, 2, 2, 3, 1])
    for _ in range(3):
        before = copy.deepcopy(model)
        guard.optimizer.zero_grad()
        guard.record(lambda: Variant.apply(4 * model(INPUTS), labels, ignored, smoothing, cap))
        Variant.apply(4 * model(INPUTS), labels, ignored, smoothing, cap).backward()
        guard.optimizer.step()
        if cap is not None or smoothing:
            assert guard.last.status == "unmeasured"
            assert "Variant" in guard.last.reason
        else:
            r = expected(before, model, 4, labels != ignored)
            assert guard.last.normalized_step == pytest.approx(r, rel=5e-3)


def expected(before, after, scale, counted=COUNTED):
    """Return r of the rows that count, by a central difference in float64."""
    probe, share, ends = copy.deepcopy(before).double(), 1e-6, []
    params = list(probe.parameters())
    starts = [param.detach().clone() for param in params]
    for sign in (1, -1):
        for param, start, end in zip(params, starts, after.parameters(), strict=True):
            param.data = start + sign * share * (end.detach().double() - start)
        ends.append(scale * probe(INPUTS.double())[counted].detach())
    tangent = (ends[0] - ends[1]) / (2 * share)
    return float((tangent.amax(-1) - tangent.amin(-1)).max()) / torch.pi
