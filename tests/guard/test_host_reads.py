"""How often a step waits for the device, and asks the other ranks, counted on a CPU."""

import json
from collections import Counter

import pytest
import torch
from helpers.host_reads import HostReads
from helpers.scripts import run_script
from torch import nn
from torch.nn.functional import cross_entropy

from safestep import SafeStep

LABELS = torch.arange(16) % 5


def squares(outputs):
    return outputs.square().mean()


def entropy(outputs):
    return cross_entropy(outputs, LABELS)


def steps(loss, *, count=40, **options):
    """Yield the report of each step and what was read in it, forward and backward pass included."""
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    guard = SafeStep(optimizer, model, **options)
    for _ in range(count):
        with HostReads() as seen:
            optimizer.zero_grad()
            loss(model(torch.randn(16, 6))).backward()
            optimizer.step()
        assert guard.last is not None
        yield guard.last, seen.reads


@pytest.mark.parametrize("copy", [True, False], ids=["copy", "no copy"])
def test_a_predicted_step_reads_once(copy):
    found = list(steps(entropy, copy=copy))
    predicted = [step for step, (report, _) in enumerate(found) if report.estimator == "predicted"]

    assert len(predicted) > 20
    for step in predicted:
        more = Counter(found[step][1])
        more.subtract({"guard/health.py: _read": 1})
        # Ever more rarely, at powers of two, what a forward pass writes into is looked at closely.
        rare = {} if (step + 1) & step else {"capture/copies.py: <dictcomp>": 2}
        assert +more == rare


@pytest.mark.filterwarnings("ignore:SafeStep")
def test_a_step_known_to_be_unmeasured_reads_twice_at_most():
    *_, (report, reads) = steps(squares)

    assert report.status == "unmeasured"
    assert sum(reads.values()) <= 2, reads  # the norms, and whether the loss is another one


def test_a_measured_step_reads_the_slopes_of_its_audit_at_once():
    *_, (report, reads) = steps(entropy, count=18, estimator="jvp")

    assert report.estimator == "jvp"
    assert report.gradient_ratio == pytest.approx(1.0, rel=1e-4)
    assert {place: n for place, n in reads.items() if "gradient_audit" in place} == {
        "measure/gradient_audit.py: _read": 1
    }
    assert sum(reads.values()) <= 32, reads  # what the logits are is asked anew at every step


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_ask_each_other_once_in_a_predicted_step(tmp_path, num_ranks):
    run_script("asking_ranks.py", tmp_path, num_ranks, timeout=300)

    for rank in range(num_ranks):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        predicted = [asked for kind, asked in found["auto"] if kind == "predicted"]
        assert len(predicted) > 10
        assert all(asked == {"allgather_.default": 1} for asked in predicted)
        assert {json.dumps(asked) for kind, asked in found["jvp"] if kind == "jvp"} == {
            json.dumps(Counter({"allgather_.default": 1}))
        }
        *_, (_, asked) = found["squares"]
        assert sum(asked.values()) <= 1
