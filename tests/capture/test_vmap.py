"""Steps that compute example by example with torch.func.vmap."""

import copy

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.nn import functional

from safestep import SafeStep
from safestep.capture.vmap import all_examples

TEMPERATURE = 2.0
INPUTS = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 5
SPLIT = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1))
SPLIT[1] *= 20


def of_one(logits, label):
    return functional.cross_entropy(logits / TEMPERATURE, label)


def by_log_softmax(logits, label):
    return -(logits / TEMPERATURE).log_softmax(-1).gather(-1, label.view(1)).sum()


STEPS = {
    "loss of each": lambda model: vmap(of_one)(model(INPUTS), LABELS).mean(),
    "classes last to first": lambda model: vmap(of_one, in_dims=(1, 0))(
        model(INPUTS).T, LABELS
    ).mean(),
    "model of each": lambda model: vmap(lambda x, y: of_one(model(x), y))(INPUTS, LABELS).mean(),
    "log-probability of each": lambda model: vmap(by_log_softmax)(model(INPUTS), LABELS).mean(),
    "groups of examples": lambda model: vmap(vmap(lambda x, y: of_one(model(x), y)))(
        INPUTS.view(3, 4, 4), LABELS.view(3, 4)
    ).mean(),
}


def shared_labels(model):
    """Rows 4, 5, 6 and 7 are the second of three groups, whose label does not count."""
    labels = torch.tensor([1, -100, 4])
    inner = vmap(functional.cross_entropy, in_dims=(0, None))
    losses = vmap(inner)(model(SPLIT) / TEMPERATURE, labels)
    return losses[[0, 2]].mean()


def test_labels_that_examples_share_count_for_each_of_them(dense_normalized_step):
    torch.manual_seed(0)
    model = nn.Linear(4, 5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    guard = SafeStep(optimizer, model, action="monitor")
    before = copy.deepcopy(model)

    guard.record(shared_labels, model)
    shared_labels(model).backward()
    optimizer.step()

    expected = dense_normalized_step(before, model, SPLIT[[0, 2]]) / TEMPERATURE
    assert guard.last.normalized_step == pytest.approx(expected, rel=1e-5)  # float32


@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")
@pytest.mark.parametrize("name", STEPS)
def test_a_recorded_step_with_vmap_is_measured_on_all_examples(name, dense_normalized_step):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    guard = SafeStep(optimizer, model, action="monitor")
    before = copy.deepcopy(model)

    guard.record(STEPS[name], model)
    STEPS[name](model).backward()
    optimizer.step()

    assert guard.last.estimator == "jvp"
    expected = dense_normalized_step(before, model, INPUTS) / TEMPERATURE
    assert guard.last.normalized_step == pytest.approx(expected, rel=1e-5)  # float32


@pytest.mark.parametrize("axes", [(0, 0), (1, 0), (2, 1), (0, 1)], ids=str)
def test_examples_of_examples_are_put_in_front_in_order(axes):
    tensor = torch.arange(24).view(2, 3, 4)
    seen = []

    def look(inner):
        seen.append(all_examples(inner))
        return inner

    vmap(vmap(look, in_dims=axes[1]), in_dims=axes[0])(tensor)

    outer = tensor.movedim(axes[0], 0)
    assert torch.equal(seen[0], outer.movedim(axes[1] + 1, 1))
