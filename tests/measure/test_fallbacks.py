"""Estimators: which one measures, how well, and what is said where one fails or two differ."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from safestep import SafeStep
from safestep.capture.call import Call
from safestep.capture.random_state import CallConditions
from safestep.measure.estimators import difference, jvp, secant

ESTIMATORS = ["jvp", "difference", "secant"]


class Square(torch.autograd.Function):
    """Has a backward pass and no forward-mode derivative."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs)
        return inputs * inputs

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Apply(nn.Module):
    """Hidden features, what `function` makes of them, classes."""

    def __init__(self, function):
        super().__init__()
        self.hidden, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.function = function

    def forward(self, inputs):
        return self.head(self.function(self, inputs))


class Attend(nn.Module):
    """Scaled dot-product attention on torch's default backend."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 24)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs):
        queries, keys, values = self.inner(inputs).unsqueeze(0).unsqueeze(0).chunk(3, -1)
        attended = functional.scaled_dot_product_attention(queries, keys, values)
        return self.head(attended[0, 0])


class Recurrent(nn.Module):
    """An LSTM over the batch as one sequence."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(5, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(self.layer(inputs.unsqueeze(0))[0][0])


class Viewing(nn.Module):
    """Computes with its weight and with a view of it that it has kept."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))
        self.kept = self.weight.data.t()

    def forward(self, inputs):
        return inputs @ self.weight.t() + inputs @ self.kept


def recompute(model, inputs):
    # The input needs a gradient for a reentrant checkpoint to work, and carries no tangent.
    inputs = inputs.clone().requires_grad_()
    return checkpoint(model.hidden, inputs, use_reentrant=True).tanh()


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    return nn.Sequential(nn.Linear(5, 8), nn.Unflatten(1, (1, 8)), layer, nn.Flatten(), head())


def head():
    return nn.Linear(8, 3)


EXACT = {
    "default attention": Attend,
    "encoder fast path": encoder,
    "LSTM": Recurrent,
    "matrix exponential": lambda: nn.Sequential(
        parametrizations.orthogonal(nn.Linear(5, 8), orthogonal_map="matrix_exp"), head()
    ),
}
WITHOUT_FORWARD_DERIVATIVE = {
    "autograd.Function": (lambda: Apply(lambda m, x: Square.apply(m.hidden(x))), "the model"),
    "cdist": (lambda: Apply(lambda m, x: torch.cdist(x, m.hidden.weight)), "_cdist_forward"),
    "grid_sample": (
        lambda: Apply(
            lambda m, x: (
                functional.grid_sample(
                    x.view(1, 1, 8, 5), m.hidden(x).tanh().view(1, 8, 4, 2), align_corners=False
                )
                .view(8, 4)
                .repeat(1, 2)
            )
        ),
        "grid_sampler_2d",
    ),
    "weight_norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 8)), nn.Tanh(), head()),
        r"0\.parametrizations\.weight\.0 \(_WeightNorm\)",
    ),
}


def build(make_model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_model()


def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 5, generator=generator), torch.randint(3, (8,), generator=generator)


def take_steps(model, count, *, lr=0.01, **options):
    """Return the reports of some guarded steps, and the model before the last of them."""
    inputs, target = batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    guard = SafeStep(optimizer, model, action="monitor", **options)
    reports, before = [], None
    for _ in range(count):
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), target).backward()
        optimizer.step()
        reports.append(guard.last)
    return reports, before


@pytest.mark.parametrize("name", EXACT)
def test_forward_mode_measures_exactly_through(name, dense_normalized_step):
    model = build(EXACT[name])

    reports, before = take_steps(model, 2)

    assert [report.estimator for report in reports] == ["jvp", "jvp"]
    expected = dense_normalized_step(before, model, batch()[0])
    assert reports[-1].normalized_step == pytest.approx(expected, rel=1e-5)


def test_forward_mode_sees_through_a_reentrant_checkpoint(dense_normalized_step):
    model = build(lambda: Apply(recompute))

    reports, before = take_steps(model, 2)

    before.function = lambda model, inputs: model.hidden(inputs).tanh()
    expected = dense_normalized_step(before, model, batch()[0])
    assert reports[-1].estimator == "jvp"
    assert reports[-1].normalized_step == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", WITHOUT_FORWARD_DERIVATIVE)
def test_the_difference_takes_over_with_one_warning_that_names_the_module_at(
    name, dense_normalized_step
):
    make_model, culprit = WITHOUT_FORWARD_DERIVATIVE[name]
    model = build(make_model)

    with pytest.warns(UserWarning, match=rf"(?s){culprit}.* finite difference") as warned:
        reports, before = take_steps(model, 3)

    assert len(warned) == 1
    assert {report.estimator for report in reports} == {"difference"}
    expected = dense_normalized_step(before, model, batch()[0])
    assert reports[-1].normalized_step == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("estimator", ["jvp", "difference"])
def test_a_kept_view_of_a_parameter_counts(estimator):
    model = build(Viewing)

    reports, before = take_steps(model, 2, estimator=estimator)

    change = (model.weight - before.weight).detach().double()
    tangent = 2 * batch()[0].double() @ change.t()
    spread = (tangent.amax(-1) - tangent.amin(-1)).max().item()
    assert reports[-1].estimator == estimator
    assert reports[-1].normalized_step == pytest.approx(spread / torch.pi, rel=1e-3)


def rows_of(estimator, factor, *, autocast=None, share=1):
    """Return the largest spread that an estimator finds for an update of some size."""
    model, (inputs, _) = build(lambda: Apply(lambda m, x: m.hidden(x).tanh())), batch()
    generator = torch.Generator().manual_seed(5)
    params = list(model.parameters())
    update = [factor * 0.01 * torch.randn(p.shape, generator=generator) for p in params]
    start = [p.detach().clone() for p in params]
    call = Call.of(model, (inputs,), {}, CallConditions(model))
    call.autocast = (("cpu", autocast),) if autocast else ()
    share = {} if share == 1 else {"share": share}
    if estimator is secant:
        with torch.no_grad():
            torch._foreach_add_(params, update)
        update = start
    (row,) = estimator([call], model, params, update, lambda output: output, **share)
    return float((row.tangent.amax(-1) - row.tangent.amin(-1)).max())


# An update of a millionth of the parameters is rounded to some twenty steps of float32.
@pytest.mark.parametrize(("factor", "rel"), [(1e-4, 2e-2), (1.0, 2e-3), (1e4, 2e-3)], ids=str)
def test_a_difference_is_right_for_any_size_of_update(factor, rel):
    assert rows_of(difference, factor) == pytest.approx(rows_of(jvp, factor), rel=rel)


@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e4], ids=str)
def test_a_difference_is_usable_in_bfloat16(factor):
    exact = rows_of(jvp, factor)

    assert rows_of(difference, factor, autocast=torch.bfloat16) == pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize("estimator", ["difference", "secant"])
def test_logits_that_nobody_holds_are_measured_by_the(estimator):
    """linear_cross_entropy shows hidden states and a weight: both ends of the step need theirs."""
    expected, measured = (fused_normalized_step(name) for name in ("jvp", estimator))

    assert measured == pytest.approx(expected, rel=0.05 if estimator == "secant" else 2e-3)


def fused_normalized_step(estimator):
    model, (inputs, target) = build(head_only), batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    guard = SafeStep(optimizer, model, action="monitor", estimator=estimator)

    def training_step(inputs):
        return functional.linear_cross_entropy(
            model[:2](inputs), model[2].weight, target, linear_bias=model[2].bias
        )

    guard.record(training_step, inputs)
    training_step(inputs).backward()
    optimizer.step()
    assert guard.last.status == "ok", guard.last.reason
    return guard.last.normalized_step


def test_the_secant_is_right_near_small_steps_and_saturates_at_giant_ones():
    assert rows_of(secant, 1.0) == pytest.approx(rows_of(jvp, 1.0), rel=0.05)
    assert rows_of(secant, 1e4) > 1e2 * rows_of(jvp, 1.0)
    assert rows_of(secant, 1e4) != pytest.approx(rows_of(jvp, 1e4), rel=0.05)


def test_the_error_of_a_secant_shrinks_with_the_share_of_the_step():
    exact = rows_of(jvp, 5.0)
    errors = [abs(rows_of(secant, 5.0, share=1 / parts) / exact - 1) for parts in (1, 2, 4, 8)]
    for far, near in pairwise(errors):
        assert near == pytest.approx(far / 2, rel=0.05)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_measuring_leaves_parameters_bitwise_alone_with(estimator):
    models = [build(lambda: Apply(lambda m, x: m.hidden(x).relu())) for _ in range(2)]

    take_steps(models[0], 20, estimator=estimator)
    inputs, target = batch()
    optimizer = torch.optim.Adam(models[1].parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        functional.cross_entropy(models[1](inputs), target).backward()
        optimizer.step()

    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
        assert one._version == other._version


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_update_of_zero_has_r_zero_with(estimator):
    reports, _ = take_steps(build(head_only), 1, lr=0.0, estimator=estimator)

    assert (reports[0].status, reports[0].normalized_step) == ("ok", 0.0)


def head_only():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), head())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_logits_that_do_not_follow_the_parameters_are_unmeasured_not_safe(estimator):
    def logits(output):
        return torch.ones_like(output.detach())

    with pytest.warns(UserWarning, match="no tangent reaches|do not change along"):
        reports, _ = take_steps(build(head_only), 1, estimator=estimator, logits=logits)

    assert reports[0].status == "unmeasured"


def test_estimators_that_differ_are_both_reported_and_the_difference_counts():
    model = build(head_only)
    kept = model[0].weight.data.t()  # a view out of reach: forward mode cannot see it move
    model[1].forward = lambda hidden: hidden + 20 * batch()[0] @ kept

    with pytest.warns(UserWarning, match=r"differ: jvp r .*; difference r .*, which counts"):
        (report, *_), _ = take_steps(model, 2)

    assert report.estimator.startswith("difference (r ")
    counts, other = (float(n) for n in report.estimator[14:-1].split("; jvp r "))
    assert counts > 1.2 * other
    assert report.normalized_step == pytest.approx(counts, rel=1e-2)


def test_a_call_that_cannot_be_repeated_is_reported_and_forward_mode_counts():
    generator = torch.Generator().manual_seed(0)
    noisy = Apply(lambda m, x: m.hidden(x) + torch.randn(8, generator=generator))

    with pytest.warns(UserWarning, match="draws from a random generator that is out of reach"):
        reports, _ = take_steps(build(lambda: noisy), 2)

    assert reports[0].normalized_step < 1
    assert "; difference r " in reports[0].estimator


def test_checks_become_rarer_while_estimators_agree():
    model, runs = build(head_only), []
    model.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else runs.append(1))

    take_steps(model, 32, estimator="jvp")

    checks = 3 + 4  # steps 0, 1, 2, and then 4, 8, 16, 32 but for the last, which is one too far
    assert len(runs) == 32 + 3 * (checks - 1)


def test_a_check_that_cannot_be_made_is_said_once_and_tried_again_ever_more_rarely(monkeypatch):
    calls = []

    def broken(*_):
        calls.append(1)
        raise ValueError("no second opinion. And more")

    monkeypatch.setattr("safestep.measure.estimator_registry.difference", broken)
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 5), torch.randn(16, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    guard = SafeStep(optimizer, model, estimator="jvp")

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), torch.arange(16) % 5).backward()
        optimizer.step()

    with pytest.warns(UserWarning, match=r"r by jvp could not be checked .*no second opinion\)"):
        step()
    for _ in range(13):
        step()  # a second warning would be an error

    assert guard.last.status == "ok"
    assert len(calls) == 3  # steps 0, 2, 6
