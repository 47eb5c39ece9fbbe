"""SafeStep attaches and detaches, is copied with nothing and resumes from its state."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers.optimizers import Hookless, ScheduleFreeWrapper
from torch import optim

from safestep import SafeStep


def test_detach_takes_every_hook_back(model, batch, train_step):
    optimizer = optim.SGD(model.parameters(), lr=100.0)
    guard = SafeStep(optimizer, model)
    train_step(optimizer, model, batch)

    guard.detach()

    for hooks in (
        model._forward_hooks, model._forward_pre_hooks, model._forward_hooks_with_kwargs,
        model._forward_pre_hooks_with_kwargs, optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
    ):  # fmt: skip
        assert not hooks
    last = guard.last
    train_step(optimizer, model, batch)
    assert guard.last is last
    SafeStep(optimizer, model).detach()


def test_the_context_manager_guards_inside_and_detaches_behind(model, batch, train_step):
    optimizer = optim.SGD(model.parameters(), lr=100.0)

    with SafeStep(optimizer, model) as guard:
        train_step(optimizer, model, batch)

    assert guard.last.status == "clipped"
    assert not optimizer._optimizer_step_pre_hooks


# After an unguarded step at this learning rate every other class's gradient is 0.
@pytest.mark.filterwarnings("ignore:SafeStep. output is taken for the logits")
def test_a_disabled_guard_lets_every_step_pass_unseen(model, batch, train_step):
    optimizer = optim.SGD(model.parameters(), lr=100.0)
    guard = SafeStep(optimizer, model)
    guard.enabled = False
    train_step(optimizer, model, batch)
    assert guard.last is None

    guard.enabled = True
    train_step(optimizer, model, batch)

    assert guard.last.step == 0


def test_state_makes_a_round_trip_through_a_file_and_is_not_changed(
    model, batch, tmp_path, train_step
):
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with SafeStep(optimizer, model) as guard:
        for _ in range(3):
            train_step(optimizer, model, batch)
        torch.save(guard.state_dict(), tmp_path / "guard.pt")
    state = torch.load(tmp_path / "guard.pt")
    before = copy.deepcopy(state)

    resumed = SafeStep(optimizer, model)
    resumed.load_state_dict(state)
    train_step(optimizer, model, batch)

    assert resumed.last.step == 3
    assert state == before


def test_a_copied_or_pickled_model_has_no_guard(model, batch, train_step):
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, model)

    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other = optim.SGD(twin.parameters(), lr=0.1)
        train_step(other, twin, batch)
        assert guard.last is None
        SafeStep(other, twin).detach()

    train_step(optimizer, model, batch)
    assert guard.last.step == 0


def test_a_guard_refuses_to_be_copied(model):
    guard = SafeStep(optim.SGD(model.parameters(), lr=0.1), model)

    with pytest.raises(TypeError, match="expected not to be copied or pickled"):
        copy.deepcopy(guard)
    with pytest.raises(TypeError, match="expected not to be copied or pickled"):
        pickle.dumps(guard)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"estimator": "jacobian"}, ValueError, "`estimator` to be .*'jvp'.*got 'jacobian'"),
        ({"logits": 3}, TypeError, "`logits` to be callable, got int"),
        ({"action": "stop"}, ValueError, "`action` to be one of"),
        ({"max_consecutive_skips": 0}, ValueError, "to be a positive integer, got 0"),
        ({"model": len}, TypeError, "`model` to be a torch.nn.Module, got builtin"),
        ({"optimizer": 1}, TypeError, "`optimizer` to be a torch.optim.Optimizer .*, got int"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_option_is_an_error_and_leaves_no_hook(options, error, message, model):
    optimizer = optim.SGD(model.parameters(), lr=0.1)

    with pytest.raises(error, match=message):
        SafeStep(**({"optimizer": optimizer, "model": model} | options))

    assert not optimizer._optimizer_step_pre_hooks
    assert not model._forward_hooks


def test_a_second_guard_on_one_optimizer_is_an_error(model):
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    SafeStep(optimizer, model)

    with pytest.raises(ValueError, match="got one that has it already"):
        SafeStep(optimizer, model)


@pytest.mark.parametrize("kind", [ScheduleFreeWrapper, Hookless])
def test_an_optimizer_without_hooks_is_guarded_until_detached(kind, model, batch, train_step):
    optimizer = kind(optim.SGD(model.parameters(), lr=100.0))
    guard = SafeStep(optimizer, model)
    with pytest.raises(ValueError, match="got one that has it already"):
        SafeStep(optimizer, model)
    train_step(optimizer, model, batch)
    assert guard.last.status == "clipped"

    guard.detach()

    train_step(optimizer, model, batch)
    assert guard.last.step == 0


def test_a_guard_is_detached_from_a_step_that_was_wrapped_since(model, batch, train_step):
    optimizer = ScheduleFreeWrapper(optim.SGD(model.parameters(), lr=0.1))
    guard = SafeStep(optimizer, model)
    copy.deepcopy(optimizer).step()
    assert guard.last is None
    inner, calls = optimizer.step, []
    optimizer.step = lambda: calls.append(inner())
    train_step(optimizer, model, batch)
    guard.detach()

    train_step(optimizer, model, batch)
    assert len(calls) == 2
    assert guard.last.step == 0


def test_gradient_release_is_refused(model):
    optimizer = optim.SGD([{"params": model.parameters(), "gradient_release": True}], lr=0.1)
    with pytest.raises(ValueError, match=r"got SGD that updates each within the backward pass"):
        SafeStep(optimizer, model)
    model = torch.nn.Linear(5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates what it imports there
        from torch.distributed.optim import _apply_optimizer_in_backward
    _apply_optimizer_in_backward(optim.SGD, model.parameters(), {"lr": 0.1})
    with pytest.raises(ValueError, match=r"Call its step\(\) after backward\(\) instead"):
        SafeStep(optim.SGD(model.parameters(), lr=0.1), model)


def test_a_step_within_the_backward_pass_is_never_called_measured(model, batch):
    optimizers = {param: optim.Adam([param], lr=1e-3) for param in model.parameters()}
    guards = [SafeStep(optimizer, model) for optimizer in optimizers.values()]
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())

    loss = torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    with pytest.warns(UserWarning, match="steps within the backward pass"):
        loss.backward()

    assert {guard.last.status for guard in guards} == {"unmeasured"}
    assert "step after backward() to measure" in guards[-1].last.reason
