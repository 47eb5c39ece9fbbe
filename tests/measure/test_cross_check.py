"""Finite differences know their error, and check forward mode for as long as a run lasts."""

import copy
import math
import os
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

from safestep import SafeStep
from safestep.measure.estimators import difference_scale
from safestep.measure.finite_difference import Difference, Outcome
from safestep.measure.schedule import LONGEST_GAP, Schedule
from safestep.radius.batch import BatchRadius


class DetachedNorm(nn.Module):
    """Weight normalisation whose norm is detached, as adapter libraries have it."""

    def __init__(self):
        super().__init__()
        self.base = nn.Parameter(torch.randn(16, 16) / 4, requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(4, 16) / 4), nn.Parameter(torch.zeros(16, 4))
        self.gain = nn.Parameter(self.base.norm(dim=1))
        self.head = nn.Linear(16, 5)

    def forward(self, inputs):
        weight = self.base + self.b @ self.a
        return self.head(torch.relu(inputs @ (self.gain / weight.norm(dim=1).detach() * weight.T)))


class Words:
    """Sentences of the standard library's source, and Lightning's example Transformer."""

    def __init__(self):
        from lightning.pytorch.demos import Transformer

        torch.manual_seed(0)
        with open(os.__file__) as source:
            text = source.read().split()
        places = {word: place for place, word in enumerate(sorted(set(text)))}
        self.ids = torch.tensor([places[word] for word in text])
        self.model = Transformer(vocab_size=len(places), ninp=32, nhead=2, nhid=32, nlayers=2)

    def batch(self):
        begins = torch.randint(len(self.ids) - 20, (16,))
        return tuple(torch.stack([self.ids[b + k : b + k + 16] for b in begins]) for k in (0, 1))


class Casting(nn.Sequential):
    """Enters autocast by itself and returns float32, as wrapped models do."""

    def forward(self, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(inputs).float()


def float64_r(model, before, change, *inputs):
    """Return r by a central difference in float64, with the random state of the forward pass."""
    wide = copy.deepcopy(model).double()

    def logits(share):
        with torch.no_grad(), torch.random.fork_rng():
            for name, param in wide.named_parameters():
                if name in change:
                    param.copy_(before[name] + share * change[name])
            return wide(*inputs)

    tangent = (logits(1e-5) - logits(-1e-5)) / 2e-5
    return float((tangent.amax(-1) - tangent.amin(-1)).max()) / math.pi


def train(words, steps, **options):
    """Yield the report of each step, and its r in float64."""
    model = words.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, model, action="monitor", **options)
    for _ in range(steps):
        inputs, target = words.batch()
        before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
        state = torch.get_rng_state()
        optimizer.zero_grad()
        functional.nll_loss(model(inputs, target), target.view(-1)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        later = torch.get_rng_state()
        torch.set_rng_state(state)
        change = {n: p.detach().double() - before[n] for n, p in model.named_parameters()}
        yield guard.last, float64_r(model, before, change, inputs, target)
        torch.set_rng_state(later)


def test_an_exact_r_is_not_overruled_by_a_difference_that_goes_too_far():
    """Its update is a ten-thousandth of the parameters, and r changes by half within it."""
    for report, expected in train(Words(), 6, estimator="jvp"):
        assert report.estimator == "jvp"
        assert report.normalized_step == pytest.approx(expected, rel=1e-3)


def test_a_difference_stays_near_where_the_update_is_long():
    for report, expected in train(Words(), 6, estimator="difference"):
        assert report.estimator == "difference"
        assert report.normalized_step == pytest.approx(expected, rel=3e-2)


@pytest.mark.filterwarnings("ignore:SafeStep. two estimators of one step differ")
def test_a_detach_that_starts_to_matter_later_is_noticed_and_the_difference_counts():
    torch.manual_seed(0)
    model = DetachedNorm()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    guard = SafeStep(optimizer, model, estimator="jvp", action="monitor")
    inputs, target = torch.randn(64, 16), torch.randint(5, (64,))
    for step in range(30):
        before = {n: p.detach().double().clone() for n, p in trained.items()}
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), target).backward()
        optimizer.step()
        if step in {0, 29}:
            change = {n: p.detach().double() - before[n] for n, p in trained.items()}
            expected = float64_r(model, before, change, inputs.double())
            assert guard.last.normalized_step == pytest.approx(expected, rel=2e-2)
    assert guard.last.estimator.startswith("difference (r ")
    assert "; jvp r " in guard.last.estimator


@pytest.mark.parametrize("lr", [1e-5, 5e-3, 0.3], ids=str)
@pytest.mark.parametrize("where", ["around", "inside", "parameters"])
def test_no_check_fails_in_bfloat16_whatever_the_length_of_the_update(where, lr):
    torch.manual_seed(0)
    layers = nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 50)
    model = (Casting if where == "inside" else nn.Sequential)(*layers)
    inputs, target = torch.randn(64, 16), torch.randint(50, (64,))
    if where == "parameters":
        model, inputs = model.to(torch.bfloat16), inputs.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    guard = SafeStep(optimizer, model, estimator="jvp", action="monitor")
    for _ in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
            loss = functional.cross_entropy(model(inputs).float(), target)
        loss.backward()
        optimizer.step()  # two estimators that differ would be a warning, here an error
        is_checked = "not checked" not in guard.last.estimator
        assert is_checked or where == "parameters"


@pytest.mark.parametrize("lr", [5e-5, 5e-2], ids=str)
@pytest.mark.parametrize("where", ["around", "inside"])
def test_a_difference_under_autocast_is_that_of_float32(where, lr):
    torch.manual_seed(0)
    layers = nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 50)
    model = (Casting if where == "inside" else nn.Sequential)(*layers)
    inputs, target = torch.randn(64, 16), torch.randint(50, (64,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    guard = SafeStep(optimizer, model, estimator="difference", action="monitor")
    before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        loss = functional.cross_entropy(model(inputs), target)
    loss.backward()
    optimizer.step()

    change = {n: p.detach().double() - before[n] for n, p in model.named_parameters()}
    expected = float64_r(nn.Sequential(*layers), before, change, inputs.double())
    assert guard.last.normalized_step == pytest.approx(expected, rel=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")  # again


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3], ids=str)
def test_a_difference_never_goes_further_than_a_small_share_of_the_update(size, dtype):
    params = [torch.ones(100, dtype=dtype)]

    share = difference_scale(params, [size * params[0]], dtype)

    assert 0 < share <= 1 / 128
    assert share * size <= 3e-4


@pytest.mark.parametrize("length", [0.0, math.inf, math.nan], ids=str)
def test_an_update_without_a_length_has_a_distance_all_the_same(length):
    params = [torch.ones(3)]

    assert difference_scale(params, [length * params[0]], torch.float32) == 1.0


def of(r, error):
    return Difference(BatchRadius(1 / r, math.pi * r, 0, None), error)


@pytest.mark.parametrize(
    ("r", "second", "outcome"),
    [
        (1.0, of(1.01, 1e-4), Outcome.AGREES),
        (1.0, of(1.5, 1e-2), Outcome.DIFFERS),
        (1.5, of(1.0, 1e-2), Outcome.DIFFERS),
        (7.2, of(0.39, 6.0), Outcome.UNSETTLED),
        (1.0, of(1.01, 0.5), Outcome.UNSETTLED),
    ],
    ids=str,
)
def test_a_difference_speaks_only_where_its_error_is_smaller_than_what_it_finds(r, second, outcome):
    assert second.compare(r, 0.02) is outcome


def test_checks_are_spread_over_a_run_and_come_back_after_a_disagreement():
    schedule = Schedule(3)
    due = []
    for step in range(300):
        if schedule.is_due():
            due.append(step)
            schedule.relax()
    gaps = [later - earlier for earlier, later in pairwise(due)]
    assert gaps[:6] == [1, 1, 2, 4, 8, 16]
    assert max(gaps) == LONGEST_GAP

    schedule.reset()
    assert schedule.is_due()


class OnceOutOfMemory(nn.Linear):
    """Runs out of memory in one re-run."""

    is_armed = False

    def forward(self, inputs):
        if self.is_armed and not torch.is_grad_enabled():
            self.is_armed = False
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(inputs)


@pytest.mark.filterwarnings("ignore:SafeStep.*out of memory")
def test_one_error_of_memory_leaves_the_estimator_as_it_was():
    torch.manual_seed(0)
    model = OnceOutOfMemory(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, model, estimator="jvp")
    reports = []
    for step in range(6):
        vars(model)["is_armed"] = step == 3
        optimizer.zero_grad()
        functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
        optimizer.step()
        reports.append(guard.last)

    assert {report.estimator for report in reports} == {"jvp"}
    assert [report.status for report in reports] == ["ok"] * 3 + ["unmeasured"] + ["ok"] * 2


@pytest.mark.filterwarnings("ignore:SafeStep.*no forward-mode derivative")
def test_forward_mode_comes_back_where_it_failed_for_a_while():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, model, estimator="jvp")
    used = []
    for step in range(8):
        model.register_forward_hook(lambda _, args, output, step=step: fail(output, step == 1))
        optimizer.zero_grad()
        functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
        optimizer.step()
        used.append(guard.last.estimator)
        model._forward_hooks.popitem()

    assert used[:2] == ["jvp", "difference"]
    assert used[-1] == "jvp"


def fail(output, is_asked):
    tangent = torch.autograd.forward_ad.unpack_dual(output).tangent if is_asked else None
    if tangent is not None:
        raise RuntimeError("no kernel for it today")
    return output
