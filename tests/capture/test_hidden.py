"""Parts of a loss whose logits are not seen, risk sets, and a batch that is one row."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from safestep import SafeStep

_random = torch.Generator().manual_seed(0)
INPUTS = torch.randn(8, 5, generator=_random)
LABELS = torch.randint(0, 3, (8,), generator=_random)
BY_HAND = r"softmax or sigmoid written by hand"


def network(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, classes))


def step(model, loss, record=True):
    """Make one guarded step and return its report."""
    guard = SafeStep(torch.optim.SGD(model.parameters(), 0.1), model)
    if record:
        guard.record(loss)
    loss().backward()
    guard.optimizer.step()
    return guard.last


def expected(before, after, logits):
    """Return r of a row of logits, by a central difference in float64."""
    params, share = list(before.double().parameters()), 1e-6
    starts = [param.detach().clone() for param in params]
    ends = []
    for sign in (1, -1):
        for param, start, end in zip(params, starts, after.parameters(), strict=True):
            param.data = start + sign * share * (end.detach().double() - start)
        ends.append(logits(before).detach())
    tangent = (ends[0] - ends[1]) / (2 * share)
    return float((tangent.amax(-1) - tangent.amin(-1)).max()) / torch.pi


def softmax_by_hand(logits):
    powers = (logits - logits.detach().amax(1, keepdim=True)).exp()
    return -(powers / powers.sum(1, keepdim=True))[torch.arange(8), LABELS].log().mean()


def sigmoid_by_hand(logits):
    return (1 / (1 + (-logits).exp()) - functional.one_hot(LABELS, 3)).square().mean()


def softplus_by_hand(logits):
    return torch.log1p(logits.exp()).mean() - logits.gather(1, LABELS[:, None]).mean()


BY_HAND_LOSSES = [softmax_by_hand, sigmoid_by_hand, softplus_by_hand]


@pytest.mark.parametrize("loss", BY_HAND_LOSSES)
def test_a_softmax_by_hand_is_named_as_the_obstacle(loss):
    model = network()

    with pytest.warns(UserWarning, match=BY_HAND):
        last = step(model, lambda: loss(model(INPUTS)))

    assert last.status == "unmeasured"


@pytest.mark.parametrize("loss", BY_HAND_LOSSES)
def test_a_softmax_by_hand_beside_a_known_loss_is_warned_of(loss):
    model = network()

    def both():
        logits = model(INPUTS)
        return loss(5 * logits) + functional.cross_entropy(logits, LABELS)

    with pytest.warns(UserWarning, match=BY_HAND):
        assert step(model, both).status == "ok"


def test_a_loss_inside_the_model_may_be_by_hand_too():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, inputs):
            return softmax_by_hand(self.net(inputs))

    model = Model()
    with pytest.warns(UserWarning, match=BY_HAND):
        assert step(model, lambda: model(INPUTS), record=False).status == "unmeasured"


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(lambda z: (z.log_softmax(1).exp() * 2).mean(), id="importance ratio"),
        pytest.param(lambda z: (z.square() / z.exp()).mean() + z.mean(), id="Gaussian width"),
        pytest.param(lambda z: (z.exp() - z).sum(), id="Poisson rate"),
    ],
)
def test_other_exponentials_are_no_softmax_by_hand(extra):
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        def loss():
            logits = model(INPUTS)
            return functional.cross_entropy(logits, LABELS) + 0.1 * extra(logits)

        assert step(model, loss).status == "ok"


class LogProbability(torch.autograd.Function):
    """The log-probabilities of labels, without a forward-mode derivative."""

    @staticmethod
    def forward(ctx, logits):
        logs = logits.log_softmax(1)
        ctx.save_for_backward(logs)
        return logs[torch.arange(8), LABELS]

    @staticmethod
    def backward(ctx, gradient):
        (logs,) = ctx.saved_tensors
        return gradient[:, None] * (functional.one_hot(LABELS, 3) - logs.exp())


class Reversed(torch.autograd.Function):
    """Turn the gradient of a loss around."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Brier(torch.autograd.Function):
    """Squares of probabilities, whose gradient is not that of one label in each row."""

    @staticmethod
    def forward(ctx, logits):
        share = logits.softmax(1)
        ctx.save_for_backward(share)
        return (share - functional.one_hot(LABELS, 3)).square().sum(1)

    @staticmethod
    def backward(ctx, gradient):
        (share,) = ctx.saved_tensors
        slope = 2 * (share - functional.one_hot(LABELS, 3))
        return gradient[:, None] * share * (slope - (share * slope).sum(1, keepdim=True))


def test_an_own_function_is_named_as_the_obstacle_and_as_a_doubt():
    model = network()
    with pytest.warns(UserWarning, match="not seen, Brier, a torch.autograd.Function"):
        last = step(model, lambda: Brier.apply(model(INPUTS)).mean())
    assert last.status == "unmeasured"

    def both():
        logits = model(INPUTS)
        return functional.cross_entropy(logits / 5, LABELS) + Brier.apply(logits).mean()

    model = network()
    guard = SafeStep(torch.optim.SGD(model.parameters(), 0.1), model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            guard.record(both)
            both().backward()
            guard.optimizer.step()
    said = " ".join(str(warning.message) for warning in caught)
    assert guard.last.estimator == "difference (r may be larger)"
    assert "Brier in the model has no forward-mode derivative" in said
    assert "r may be larger than measured: the loss holds a part" in said


def test_an_own_function_of_the_models_output_is_measured_without_record():
    model = network()
    before = copy.deepcopy(model)

    last = step(model, lambda: -LogProbability.apply(model(INPUTS)).mean(), record=False)

    r = expected(before, model, lambda net: net(INPUTS.double()))
    assert last.normalized_step == pytest.approx(r, rel=1e-3)


def test_an_own_function_of_a_known_loss_hides_nothing():
    model = network()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        last = step(model, lambda: Reversed.apply(functional.cross_entropy(model(INPUTS), LABELS)))

    assert last.status == "ok"
    assert not any("not seen" in str(warning.message) for warning in caught)


def partial_likelihood(scores):
    """Cox's: each event against all that were at risk then."""
    return (scores.logcumsumexp(0) - scores).mean()


def test_a_partial_likelihood_is_measured_over_the_largest_risk_set():
    model = network(1)
    before = copy.deepcopy(model)

    last = step(model, lambda: partial_likelihood(model(INPUTS).squeeze(1)))

    r = expected(before, model, lambda net: net(INPUTS.double()).T)
    assert last.normalized_step == pytest.approx(r, rel=1e-3)


@pytest.mark.filterwarnings("ignore:SafeStep. output is taken for the logits")
def test_an_output_that_is_one_row_is_measured():
    model = nn.Sequential(network(1), nn.Flatten(0))
    before = copy.deepcopy(model)

    last = step(model, lambda: partial_likelihood(model(INPUTS)), record=False)

    r = expected(before, model, lambda net: net(INPUTS.double()))
    assert last.normalized_step == pytest.approx(r, rel=1e-3)
