"""Copies and pickles of a guarded model carry nothing of the guard."""

import copy
import copyreg
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from safestep import SafeStep

PICKLES = {
    "torch.save": (torch.save, lambda file: torch.load(file, weights_only=False)),
    "pickle": (pickle.dump, pickle.load),
}


class Classifier(nn.Module):
    """Keeps its layers as attributes, and counts what it has seen."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.seen = 0

    def forward(self, inputs):
        self.seen += len(inputs)
        return self.head(torch.tanh(self.body(inputs)))


class Own(Classifier):
    """Says itself how it is copied."""

    def __deepcopy__(self, memo):
        other = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other


def trained(model, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, model)
    train(model, optimizer, steps)
    return optimizer, guard


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(torch.ones(2, 4)), torch.tensor([0, 2])).backward()
        optimizer.step()


def hooks_of(model):
    tables = "_forward_hooks", "_forward_pre_hooks"
    tables += tuple(f"{name}_with_kwargs" for name in tables)
    return [hook for child in model.modules() for name in tables for hook in vars(child)[name]]


def pickled(model, how):
    dump, load = PICKLES[how]
    file = io.BytesIO()
    dump(model, file)
    assert b"safestep" not in file.getvalue()
    file.seek(0)
    return load(file)


@pytest.mark.parametrize("how", [*PICKLES, "deepcopy"])
@pytest.mark.parametrize("is_part", [False, True], ids=["all", "part of another"])
def test_a_copy_has_the_state_and_no_hook(how, is_part):
    model = nn.Sequential(nn.Linear(4, 3))
    _, guard = trained(model)
    whole = nn.ModuleDict({"model": model}) if is_part else model

    copied = copy.deepcopy(whole) if how == "deepcopy" else pickled(whole, how)

    assert hooks_of(copied) == []
    assert all(map(torch.equal, copied.parameters(), whole.parameters()))
    train(model, guard.optimizer, 1)
    assert guard.last.step == 3  # the original is still guarded
    assert guard.last.status == "ok"


def test_the_hooks_of_others_are_copied():
    model = Classifier()
    model.register_forward_hook(print)
    model.body.register_forward_pre_hook(print, with_kwargs=True)
    trained(model, steps=0)

    copied = pickled(model, "pickle")

    assert list(copied._forward_hooks.values()) == [print]
    assert len(hooks_of(copied)) == 3  # and one says that it takes keyword arguments
    assert copied.seen == model.seen == 0


def test_a_whole_model_loads_with_weights_only():
    model = nn.Linear(4, 3)
    trained(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)

    with torch.serialization.safe_globals([nn.Linear]):
        loaded = torch.load(file, weights_only=True)

    assert torch.equal(loaded.weight, model.weight)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_whole_model_loads_where_safestep_is_not_installed(is_compiled, tmp_path):
    model = nn.Linear(4, 3)
    if is_compiled:
        model.compile(backend="eager")
    trained(model)
    torch.save(model, tmp_path / "model.pt")
    script = (
        "import sys; sys.modules['safestep'] = None\n"
        "import torch; model = torch.load(sys.argv[1], weights_only=False)\n"
        "print(tuple(model(torch.ones(2, 4)).shape), len(model._forward_hooks))"
    )

    out = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "model.pt"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert out.stdout.split("\n")[-2] == "(2, 3) 0"


@pytest.mark.parametrize("how", [*PICKLES, "deepcopy"])
def test_a_model_that_copies_itself_gets_a_hook_that_does_nothing(how):
    model = Own()
    trained(model)

    copied = copy.deepcopy(model) if how == "deepcopy" else pickled(model, how)

    assert torch.equal(copied(torch.ones(2, 4)), model(torch.ones(2, 4)))
    assert "safestep" not in str(vars(copied))


def test_an_averaged_model_follows_the_guarded_one():
    model = Classifier()
    optimizer, _ = trained(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    train(model, optimizer, 2)

    averaged.update_parameters(model)

    assert hooks_of(averaged) == []
    assert averaged.module.seen == 6


def test_a_shallow_copy_is_not_guarded_and_leaves_the_original_guarded():
    model = Classifier()
    trained(model)

    other = copy.copy(model)

    assert hooks_of(other) == []
    assert other.body is model.body
    assert len(hooks_of(model)) == 4


def test_nothing_is_left_of_a_detached_guard():
    class Other(Classifier):
        pass

    model, others = Other(), Other()
    _, guard = trained(model)
    _, second = trained(others)
    guard.detach()
    assert hooks_of(model) == []
    assert hooks_of(copy.deepcopy(others)) == []

    second.detach()

    assert Other not in copyreg.dispatch_table


def test_what_a_user_says_about_the_copies_of_a_class_stands():
    class Reduced(Classifier):
        pass

    copyreg.pickle(Reduced, lambda _: (Classifier, ()))
    model = Reduced()
    _, guard = trained(model)

    assert type(copy.deepcopy(model)) is Classifier
    guard.detach()
    assert copyreg.dispatch_table.pop(Reduced)
