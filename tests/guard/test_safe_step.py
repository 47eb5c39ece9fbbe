"""What SafeStep does to a step, and what it says about it."""

import copy
import dataclasses
import json
import logging
import math

import pytest
import torch
from torch import nn, optim
from torch.nn.functional import cross_entropy

from safestep import SafeStep


def test_the_report_says_what_happened(model, batch, dense_normalized_step, train_step):
    optimizer = optim.SGD(model.parameters(), lr=100.0)
    guard = SafeStep(optimizer, model)
    assert guard.last is None
    before = copy.deepcopy(model)

    train_step(optimizer, model, batch)

    report = guard.last
    moved = [p - b for p, b in zip(model.parameters(), before.parameters(), strict=True)]
    applied = torch.cat([m.flatten() for m in moved]).norm().item()
    assert report.status == "clipped"
    assert report.step == 0
    assert report.estimator == "jvp"
    assert report.step_norm * report.scale == pytest.approx(applied, rel=1e-4)
    assert applied == pytest.approx(report.radius, rel=1e-4)
    assert report.normalized_step == pytest.approx(report.step_norm / report.radius)
    assert report.spread == pytest.approx(math.pi / report.radius, rel=1e-6)
    assert report.learning_rate == 100.0
    assert report.effective_learning_rate == pytest.approx(100.0 * report.scale)
    assert report.bottleneck in range(len(batch[0]))
    assert 0 < report.seconds < 60
    row = report.bottleneck
    assert report.reason.startswith(f"row {row} (example {row}) set the radius; run again, ")


def test_the_bottleneck_is_the_row_with_the_largest_spread(
    model, batch, dense_logit_tangent, train_step
):
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, model)
    before = copy.deepcopy(model)

    train_step(optimizer, model, batch)

    update = {
        name: param.detach() - start
        for (name, param), start in zip(model.named_parameters(), before.parameters(), strict=True)
    }
    tangent = dense_logit_tangent(before, update, batch[0])
    assert guard.last.bottleneck == (tangent.amax(-1) - tangent.amin(-1)).argmax()


@pytest.mark.parametrize("limit", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("lr", [1e-3, 1e3], ids=["short", "long"])
def test_set_brings_every_step_to_the_limit(
    limit, lr, model, batch, dense_normalized_step, train_step
):
    optimizer = optim.SGD(model.parameters(), lr=lr)
    guard = SafeStep(optimizer, model, action="set", max_normalized_step=limit)

    for _ in range(3):
        before = copy.deepcopy(model)
        train_step(optimizer, model, batch)

        # A short update has few bits in the weights: growing it shows them.
        assert dense_normalized_step(before, model, batch[0]) == pytest.approx(limit, rel=1e-3)
        assert guard.last.scale == pytest.approx(limit / guard.last.normalized_step, rel=1e-6)


def test_certified_lets_a_longer_step_through_and_is_exact_for_two_classes(make_batch, train_step):
    model = nn.Linear(5, 2).double()
    nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
    inputs = make_batch("multilayer")[0].double()
    optimizer = optim.SGD(model.parameters(), lr=100.0)
    guard = SafeStep(optimizer, model, radius="certified")
    before = copy.deepcopy(model)

    train_step(optimizer, model, (inputs, torch.ones(6, dtype=torch.long)))

    margin = before(inputs).diff(dim=-1)
    slope = (model(inputs) - before(inputs)).diff(dim=-1)  # a linear model: the tangent itself
    applied = (slope.abs() / torch.hypot(margin, torch.full_like(margin, math.pi))).max()
    assert guard.last.status == "clipped"
    assert applied.item() == pytest.approx(1.0, rel=1e-9)
    assert slope.abs().max() > math.pi


def test_a_quantile_lets_the_most_extreme_row_over_the_limit(make_model, make_batch, train_step):
    inputs, targets = make_batch("linear", size=40)
    inputs[3] *= 50.0
    model = make_model("linear")
    optimizer = optim.SGD(model.parameters(), lr=100.0)
    guard = SafeStep(optimizer, model, quantile=0.95)
    before = copy.deepcopy(model)

    train_step(optimizer, model, (inputs, targets))

    tangent = (model(inputs) - before(inputs)).double()
    rows = ((tangent.amax(-1) - tangent.amin(-1)) / math.pi).sort().values
    assert guard.last.estimator == "jvp (0.95 quantile, uncertified)"
    assert rows[-1] > 1.0
    assert rows[38].item() == pytest.approx(1.0, rel=1e-4)


def test_the_logits_option_is_what_the_radius_is_measured_on(model, batch, dense_normalized_step):
    optimizer = optim.SGD(model.parameters(), lr=100.0)
    guard = SafeStep(optimizer, model, logits=lambda output: output / 4.0)
    before = copy.deepcopy(model)

    cross_entropy(model(batch[0]) / 4.0, batch[1]).backward()
    optimizer.step()

    assert guard.last.status == "clipped"
    assert dense_normalized_step(before, model, batch[0]) == pytest.approx(4.0, rel=1e-4)


def test_a_learning_rate_of_zero_is_a_step_of_length_zero(model, batch, train_step):
    optimizer = optim.Adam(model.parameters(), lr=0.0)
    guard = SafeStep(optimizer, model, action="set")

    train_step(optimizer, model, batch)

    report = guard.last
    assert (report.status, report.scale) == ("ok", 1.0)
    assert (report.normalized_step, report.step_norm, report.radius) == (0.0, 0.0, math.inf)


def test_an_optimizer_without_a_learning_rate_is_guarded(
    model, batch, dense_normalized_step, train_step
):
    class Halving(optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure=None):
            for param in self.param_groups[0]["params"]:
                param.mul_(-20.0)

    optimizer = Halving(model.parameters())
    guard = SafeStep(optimizer, model)
    before = copy.deepcopy(model)

    train_step(optimizer, model, batch)

    assert guard.last.status == "clipped"
    assert math.isnan(guard.last.learning_rate)
    assert dense_normalized_step(before, model, batch[0]) == pytest.approx(1.0, rel=1e-4)


def test_a_step_without_a_recorded_forward_pass_is_said_to_be_unmeasured(model, batch, train_step):
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, nn.Linear(1, 1))

    with pytest.warns(UserWarning, match="not measured and left alone: no gradient came back"):
        train_step(optimizer, model, batch)

    assert guard.last.status == "unmeasured"
    assert guard.last.scale == 1.0
    assert math.isnan(guard.last.normalized_step)
    train_step(optimizer, model, batch)  # the warning came once


@pytest.mark.parametrize(
    ("guarded", "why"),
    [
        ("model", "its forward was not called, though its submodules"),
        ("backbone", "what it returned requires no gradient, since it is frozen"),
        ("head", None),
    ],
)
@pytest.mark.filterwarnings("ignore:SafeStep")
def test_fine_tuning_a_head_says_which_module_to_pass(guarded, why):
    backbone, head = nn.Linear(4, 8).requires_grad_(False), nn.Linear(8, 3)
    modules = nn.ModuleDict({"backbone": backbone, "head": head})
    optimizer = optim.AdamW(head.parameters())
    guard = SafeStep(optimizer, modules if guarded == "model" else modules[guarded])

    inputs, labels = torch.randn(6, 4), torch.arange(6) % 3
    cross_entropy(head(backbone(inputs)), labels).backward()
    optimizer.step()

    assert guard.last.status == ("ok" if why is None else "unmeasured")
    assert why is None or why in guard.last.reason


def test_the_run_log_holds_the_reports_and_what_was_noted(model, batch, tmp_path, train_step):
    optimizer = optim.SGD(model.parameters(), lr=100.0)

    with SafeStep(optimizer, model, run_dir=tmp_path) as guard:
        guard.log(loss=torch.tensor(1.5))
        train_step(optimizer, model, batch)
        first = guard.last
        train_step(optimizer, model, batch)

    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    header, *records = map(json.loads, lines)
    assert header["settings"]["optimizer"] == "SGD"
    assert header["settings"]["parameters"] == sum(p.numel() for p in model.parameters())
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == [0, 1]
    assert steps[0]["loss"] == 1.5
    assert "loss" not in steps[1]
    assert dataclasses.asdict(first).items() <= steps[0].items()


def test_interventions_are_logged_ten_times_and_then_at_powers_of_two(
    model, batch, caplog, train_step
):
    optimizer = optim.SGD(model.parameters(), lr=100.0)
    SafeStep(optimizer, model, max_normalized_step=1e-3)
    caplog.set_level(logging.INFO, logger="safestep")

    for _ in range(20):
        train_step(optimizer, model, batch)

    first, *lines = [record.getMessage() for record in caplog.records]
    assert first.startswith("logits: ")
    assert [line.split(":")[0] for line in lines] == [
        f"step {step}" for step in (*range(10), 15)
    ]  # fmt: skip
    assert "scaled by" in lines[0]
