"""Losses written outside the model: the graph of the loss shows what the gradient leaves open."""

import copy
import threading
import time
import warnings
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from safestep import SafeStep
from safestep._torch import run_backward
from safestep.capture.autograd_graph import roots_of_backward
from safestep.capture.loss_graph import use_of_output

_random = torch.Generator().manual_seed(0)
INPUTS = torch.randn(8, 5, generator=_random)
LABELS = torch.arange(8) % 4
ONE_HOT = functional.one_hot(LABELS, 4).float()
SOFT = torch.rand(8, 4, generator=_random).softmax(1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))


def dice(z):
    p = z.sigmoid()
    return 1 - (2 * (p * ONE_HOT).sum() + 1) / (p.sum() + ONE_HOT.sum() + 1)


def tversky(z):
    p = z.sigmoid()
    hits, wrong, missed = (p * ONE_HOT).sum(1), (p * (1 - ONE_HOT)).sum(1), ((1 - p) * ONE_HOT)
    return 1 - (hits / (hits + 0.3 * wrong + 0.7 * missed.sum(1))).mean()


def focal(z):
    p, cost = z.sigmoid(), functional.binary_cross_entropy_with_logits(z, ONE_HOT, reduction="none")
    return (cost * (1 - (p * ONE_HOT + (1 - p) * (1 - ONE_HOT))) ** 2).mean()


def asymmetric(z):
    p = z.sigmoid()
    rest = (1 - p + 0.05).clamp(max=1)
    logs = ONE_HOT * p.clamp(min=1e-8).log() + (1 - ONE_HOT) * rest.clamp(min=1e-8).log()
    return -(logs * (1 - p * ONE_HOT - rest * (1 - ONE_HOT)) ** (1 + 3 * (1 - ONE_HOT))).sum()


def z_loss(z):
    return functional.cross_entropy(z, LABELS) + 0.1 * z.logsumexp(-1).square().mean()


def soft_focal(z):
    return ((1 - z.softmax(1)) ** 2 * -SOFT * z.log_softmax(1)).mean()


def soft_dice(z):
    p = z.softmax(1)
    return 1 - (2 * (p * ONE_HOT).sum(0) / (p + ONE_HOT).sum(0)).mean()


def first_positions(z):
    z = z.view(2, 4, 4)[:, :-1].reshape(-1, 4)
    return -(SOFT[:6] * z.log_softmax(-1)).sum()


def binary(z):
    return torch.stack((torch.zeros_like(z), z), -1)


def same(z):
    return z


MIXED = "a quotient or logarithm of a sum of probabilities"
LOSSES = {
    "Dice": (dice, binary, MIXED),
    "Tversky": (tversky, binary, MIXED),
    "focal": (focal, binary, None),
    "asymmetric": (asymmetric, binary, None),
    "squared error of sigmoids": (lambda z: (z.sigmoid() - SOFT).square().sum(), binary, None),
    "columns": (lambda z: z[:, 1:3].sigmoid().square().sum(), lambda z: binary(z[:, 1:3]), None),
    "minus the logits": (lambda z: (functional.logsigmoid(-z) * SOFT).sum(), binary, None),
    "soft margin": (lambda z: functional.soft_margin_loss(z, 2 * ONE_HOT - 1), binary, None),
    "z-loss": (z_loss, same, None),
    "soft labels": (lambda z: functional.cross_entropy(z, SOFT), same, None),
    "soft focal": (soft_focal, same, None),
    "soft Dice": (soft_dice, same, MIXED),
    "entropy of mean predictions": (lambda z: z.softmax(1).mean(0).log().sum(), same, MIXED),
    "first positions": (first_positions, lambda z: z[[0, 1, 2, 4, 5, 6]], None),
}  # fmt: skip


def steps(loss, rows=same, count=3, **options):
    """Make guarded steps; yield each report, and r in float64 of the rows of logits."""
    model = network()
    guard = SafeStep(torch.optim.SGD(model.parameters(), 0.1), model, **options)
    for number in range(count):
        before = copy.deepcopy(model)
        guard.optimizer.zero_grad()
        current = loss(number) if rows is None else loss
        current(model(INPUTS)).backward()
        guard.optimizer.step()
        yield guard.last, expected(before, model, rows or same)


def expected(before, after, rows):
    probe, share = copy.deepcopy(before).double(), 1e-6
    params, ends = list(probe.parameters()), []
    starts = [param.detach().clone() for param in params]
    for sign in (1, -1):
        for param, start, end in zip(params, starts, after.parameters(), strict=True):
            param.data = start + sign * share * (end.detach().double() - start)
        ends.append(rows(probe(INPUTS.double())).detach())
    tangent = (ends[0] - ends[1]) / (2 * share)
    return float((tangent.amax(-1) - tangent.amin(-1)).max()) / torch.pi


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_only_its_graph_shows_is_measured(name):
    loss, rows, said = LOSSES[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for report, r in steps(loss, rows, estimator="jvp"):
            assert report.status == "ok"
            assert report.normalized_step == pytest.approx(r, rel=1e-3)

    assert [said in str(each.message) for each in caught] == ([True] if said else [])


NOT_SHOWN = {
    "distillation": (
        lambda z: functional.kl_div((z / 4).log_softmax(1), SOFT, reduction="batchmean"),
        "the labels, being soft, do not show",
    ),
    "focal at a temperature": (lambda z: focal(z / 4), "output: a division"),
    "ranking": (lambda z: -functional.logsigmoid(z[:, 0] - z[:, 1]).mean(), "stands more"),
    "preference": (
        lambda z: -functional.logsigmoid(z.log_softmax(1)[:, 0] - z.log_softmax(1)[:, 1]).mean(),
        "another softmax or sigmoid",
    ),
    "boxes and classes": (
        lambda z: (z[:, :2].sigmoid() - 0.2).square().sum() + z[:, 2:].square().sum(),
        "none is known to enter a softmax",
    ),
    "centred squares": (lambda z: (z - z.mean(1, keepdim=True)).square().sum(), "squared error"),
    "sigmoid by hand": (
        lambda z: (1 / (1 + (-z).exp()) - SOFT).square().sum(), "written by hand",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:SafeStep. a step was not measured")
@pytest.mark.parametrize("name", NOT_SHOWN)
def test_what_the_graph_does_not_show_either_is_unmeasured_with_what_stands_between(name):
    loss, reason = NOT_SHOWN[name]
    for report, _ in steps(loss):
        assert report.status == "unmeasured"
        assert reason in report.reason


@pytest.mark.parametrize("second", ["focal", "soft labels", "Dice"])
@pytest.mark.parametrize("first", ["focal", "soft labels", "z-loss"])
@pytest.mark.filterwarnings("ignore:SafeStep. the loss holds a quotient")
@pytest.mark.filterwarnings("ignore:SafeStep. a step was not measured")
def test_a_loss_that_becomes_another_one_is_seen(first, second):
    pairs = [LOSSES[first], LOSSES[second]]
    made = steps(lambda number: pairs[number > 2][0], None, 6, estimator="jvp")

    assert [report.status for report, _ in made][4:] == ["ok", "ok"]  # not yet at the change


def test_gradients_of_two_backward_passes_are_seen_together():
    model = network()
    guard = SafeStep(torch.optim.SGD(model.parameters(), 0.1), model)
    before, output = copy.deepcopy(model), model(INPUTS)
    (output.sigmoid()[:4] - 0.2).square().sum().backward(retain_graph=True)
    (output.sigmoid()[4:] - 0.7).square().sum().backward()
    guard.optimizer.step()

    assert guard.last.normalized_step == pytest.approx(expected(before, model, binary), rel=1e-3)


def test_a_hook_in_a_devices_own_thread_sees_who_waits(monkeypatch):
    """A GPU's hooks run in a thread of its own while torch's engine holds the one that called."""
    engine = SimpleQueue()  # its get() holds a thread without a Python frame of its own
    stand_in = SimpleNamespace(run_backward=engine.get)
    monkeypatch.setattr("torch.autograd.graph.Variable._execution_engine", stand_in)
    loss = dice(network()(INPUTS))
    caller = threading.Thread(target=run_backward, args=((loss,),))
    caller.start()
    deadline = time.monotonic() + 5
    while not (found := roots_of_backward()) and time.monotonic() < deadline:
        time.sleep(0.001)
    engine.put(None)
    caller.join()

    assert found == [loss.grad_fn]


def test_the_graph_of_a_loss_without_the_output_tells_nothing():
    assert use_of_output(0) is None


def rival(z):
    """Crammer and Singer's: the largest wrong logit alone is pushed away."""
    wrong = z.scatter(1, LABELS[:, None], -1e9).amax(1)
    return (1 + wrong - z.gather(1, LABELS[:, None])[:, 0]).clamp(min=0).mean()


def margin_by_hand(z):
    return (1 + z - z.gather(1, LABELS[:, None])).clamp(min=0).sum(1).mean()


def several_labels(z):
    target = torch.stack((LABELS, (LABELS + 1) % 4, *(torch.full_like(LABELS, -1),) * 2), dim=1)
    return functional.multilabel_margin_loss(z, target)


HINGES = {
    "multi_margin": lambda z: functional.multi_margin_loss(z, LABELS),
    "squared margin": lambda z: functional.multi_margin_loss(z, LABELS, p=2),
    "several labels": several_labels,
    "by hand": margin_by_hand,
    "rival": rival,
    "binary": lambda z: (1 - (2 * ONE_HOT - 1) * z).relu().mean(),
}


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("name", HINGES)
@pytest.mark.filterwarnings("ignore:SafeStep")
def test_a_hinge_holds_no_softmax_and_says_so(name, spread):
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(spread)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, model)

    HINGES[name](model(INPUTS)).backward()
    optimizer.step()

    assert guard.last.status == "unmeasured"
    assert "holds no softmax" in guard.last.reason


@pytest.mark.filterwarnings("ignore:SafeStep")
def test_the_gradient_tells_a_hinge_where_the_graph_cannot():
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(z):
            with torch.enable_grad():
                return margin_by_hand(z)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad):
            z = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                return grad * torch.autograd.grad(margin_by_hand(z), z)[0]

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, model)

    Hidden.apply(model(INPUTS)).backward()
    optimizer.step()

    assert guard.last.status == "unmeasured"
    assert "Hidden, a torch.autograd.Function" in guard.last.reason
