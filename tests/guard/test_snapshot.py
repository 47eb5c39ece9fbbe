"""A snapshot puts back what a step changed, bit for bit and in place."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam

from safestep.guard.snapshot import Snapshot
from safestep.parallel.norms import joint_norm


def fill_gradients(params, value=1.0):
    for param in params:
        param.grad = torch.full_like(param, value)


def test_restore_undoes_a_step_in_the_very_tensors_it_changed():
    model = nn.Linear(3, 2)
    optimizer = Adam(model.parameters(), lr=0.1)
    fill_gradients(model.parameters())
    optimizer.step()
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    moments = [value for state in optimizer.state.values() for value in state.values()]
    snapshot = Snapshot(optimizer)

    snapshot.take()
    fill_gradients(model.parameters(), float("nan"))
    optimizer.step()
    snapshot.restore()

    after = [model.state_dict(), optimizer.state_dict()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    kept = [value for state in optimizer.state.values() for value in state.values()]
    assert all(one is other for one, other in zip(moments, kept, strict=True))


def test_restore_is_exact_for_tensors_of_any_size_type_and_layout():
    torch.manual_seed(0)
    shapes = [(2, 3), (300, 300), (4, 3, 2, 2), (0, 5), (), (3, 7)]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    params[2] = nn.Parameter(params[2].detach().to(memory_format=torch.channels_last))
    params[5] = nn.Parameter(torch.randn(7, 3, dtype=torch.float64).t())
    optimizer = Adam(params, lr=0.1)
    for _ in range(2):
        fill_gradients(params)
        optimizer.step()
    optimizer.state[params[0]]["seen"] = torch.tensor([True, False])
    optimizer.state[params[1]]["count"] = torch.tensor(2**62 + 1)
    before = copy.deepcopy([params, optimizer.state_dict()])
    snapshot = Snapshot(optimizer)

    snapshot.take()
    fill_gradients(params, -3.0)
    optimizer.step()
    optimizer.state[params[0]]["seen"].fill_(False)
    optimizer.state[params[1]]["count"].zero_()
    update = snapshot.update([])
    moved = [p.detach() - old.detach() for p, old in zip(params, before[0], strict=True)]
    torch.testing.assert_close(list(update.change), moved, rtol=0, atol=0)
    snapshot.restore()

    torch.testing.assert_close([params, optimizer.state_dict()], before, rtol=0, atol=0)


def moved_params(dtype=torch.float32):
    """Small and large parameters, one of them not contiguous, and a step that moves them."""
    torch.manual_seed(0)
    shapes = [(3, 2), (300, 700), (512, 9, 5, 5), (7,)]
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    params[2] = nn.Parameter(params[2].detach().to(memory_format=torch.channels_last))
    for param in params:
        param.grad = torch.randn_like(param)
    return params, SGD(params, lr=0.1)


def test_the_parts_of_an_update_have_its_norm():
    params, optimizer = moved_params(torch.float64)
    before = [param.detach().clone() for param in params]
    snapshot = Snapshot(optimizer)

    snapshot.take()
    optimizer.step()

    moved = [(p.detach() - old).flatten() for p, old in zip(params, before, strict=True)]
    norm = float(joint_norm(snapshot.update([]).parts()))
    assert norm == pytest.approx(float(torch.cat(moved).norm()), rel=1e-12)


def test_an_update_is_the_same_where_it_begins_and_where_it_ends():
    params, optimizer = moved_params()
    before = [param.detach().clone() for param in params]
    snapshot = Snapshot(optimizer)
    snapshot.take()
    optimizer.step()
    after = [param.detach().clone() for param in params]
    moved = [new - old for new, old in zip(after, before, strict=True)]
    update = snapshot.update([])

    with update.at_start():
        assert all(map(torch.equal, params, before))
        assert all(map(torch.equal, update.change, moved))

    assert all(map(torch.equal, params, after))
    assert all(map(torch.equal, update.change, moved))
    snapshot.rescale(0.25)
    for param, old, move in zip(params, before, moved, strict=True):
        assert torch.equal(param, old + 0.25 * move)


def test_an_update_is_found_where_the_optimizer_keeps_its_parameters_in_its_state():
    params = [nn.Parameter(torch.randn(3)) for _ in range(3)]
    optimizer = SGD(params, lr=0.1)
    optimizer.state[params[0]] = {"count": torch.ones(3), "anchor": params[2]}
    optimizer.state[params[1]] = {"anchor": params[0]}
    snapshot = Snapshot(optimizer)
    for _ in range(2):
        fill_gradients(params)
        before = copy.deepcopy(params)
        snapshot.take()
        optimizer.step()

        update = snapshot.update([])

        moved = [p.detach() - old.detach() for p, old in zip(params, before, strict=True)]
        torch.testing.assert_close(list(update.change), moved, rtol=0, atol=0)
        torch.testing.assert_close(torch.cat(update.parts()), torch.cat(moved), rtol=0, atol=0)
        snapshot.restore()
        torch.testing.assert_close(params, before, rtol=0, atol=0)
        snapshot.release()


def test_a_state_of_a_tensor_subclass_is_copied_as_such():
    class Marked(torch.Tensor):
        pass

    param = nn.Parameter(torch.ones(2))
    optimizer = SGD([param], lr=0.1)
    optimizer.state[param] = {"one": torch.ones(2).as_subclass(Marked), "two": torch.ones(2)}
    snapshot = Snapshot(optimizer)

    snapshot.take()
    optimizer.state[param]["one"].zero_()
    optimizer.state[param]["two"].zero_()
    snapshot.restore()

    state = optimizer.state[param]
    assert type(state["one"]) is Marked
    assert state["one"].tolist() == state["two"].tolist() == [1.0, 1.0]


def test_restore_removes_the_state_that_a_first_step_made():
    model = nn.Linear(3, 2)
    optimizer = Adam(model.parameters())
    fill_gradients(model.parameters())
    snapshot = Snapshot(optimizer)

    snapshot.take()
    optimizer.step()
    snapshot.restore()

    assert not optimizer.state


def test_restore_keeps_what_an_optimizer_lists_in_its_state_as_it_was():
    param = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = LBFGS([param], lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = (param**4).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    snapshot, before = Snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["state"])
    snapshot.take()
    optimizer.step(closure)
    assert len(optimizer.state[param]["old_dirs"]) > len(before[0]["old_dirs"])

    snapshot.restore()

    after = optimizer.state_dict()["state"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_restore_takes_back_options_that_a_step_changed():
    class Decaying(SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["lr"] /= 2
            return super().step(closure)

    model = nn.Linear(3, 2)
    optimizer = Decaying(model.parameters(), lr=1.0)
    fill_gradients(model.parameters())
    snapshot = Snapshot(optimizer)

    snapshot.take()
    optimizer.step()
    snapshot.restore()

    assert optimizer.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_restore_is_exact_after_the_model_changed_its_dtype(dtype):
    model = nn.Linear(3, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    snapshot = Snapshot(optimizer)
    snapshot.take()
    snapshot.restore()
    model.to(dtype)
    with torch.no_grad():
        model.weight.fill_(1 / 3)
    before = copy.deepcopy(model.state_dict())

    snapshot.take()
    fill_gradients(model.parameters())
    optimizer.step()
    snapshot.restore()

    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_frozen_parameter_counts_while_it_has_a_gradient():
    frozen, bare = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = SGD([frozen, bare], lr=0.1)
    fill_gradients([frozen])
    frozen.requires_grad_(False)
    bare.requires_grad_(False)
    snapshot = Snapshot(optimizer)

    snapshot.take()
    optimizer.step()

    assert [param is frozen for param in snapshot.params] == [True]
    assert torch.equal(snapshot.update([]).start[0], torch.ones(2))
    snapshot.restore()
    assert torch.equal(frozen, torch.ones(2))


def test_release_frees_the_copies():
    model = nn.Linear(3, 2)
    snapshot = Snapshot(SGD(model.parameters(), lr=0.1))
    snapshot.take()

    snapshot.release()

    update = snapshot.update([])
    assert [*update.params, *update.start, *update.change] == []


def test_steps_in_and_out_of_inference_mode_do_not_share_memory():
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], lr=0.5)
    snapshot = Snapshot(optimizer)
    for is_inference in (True, False, True, False):
        param.grad = torch.ones(3)
        with torch.inference_mode(is_inference):
            start = param.detach().clone()
            snapshot.take()
            optimizer.step()
            update = snapshot.update([])

            assert torch.equal(update.start[0], start)
            assert torch.equal(update.change[0], torch.full((3,), -0.5))
            snapshot.release()


def test_a_state_that_is_a_tensor_of_its_own_kind_is_copied_by_what_it_can_do():
    class Quantized(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func in (torch.Tensor.detach, torch.Tensor.view):
                raise NotImplementedError
            return super().__torch_function__(func, types, args, kwargs)

    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], lr=0.5)
    optimizer.state[param]["kept"] = torch.arange(3.0).as_subclass(Quantized)
    snapshot = Snapshot(optimizer)
    snapshot.take()
    optimizer.state[param]["kept"] += 1
    snapshot.restore()

    assert optimizer.state[param]["kept"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("change", ["list", "count", "entry", "tensor", "data", "frozen", "group"])
def test_what_an_optimizer_came_to_hold_since_the_last_step_is_put_back(change):
    params = [nn.Parameter(torch.randn(3)) for _ in range(2)]
    optimizer = Adam(params, lr=0.1)
    optimizer.state[params[0]] = {"list": [torch.ones(2)], "count": 1} if change == "list" else {}
    if change == "count":
        optimizer.state[params[0]] = {"count": 1}
    elif change not in ("list", "count"):
        fill_gradients(params)
        optimizer.step()
    snapshot = Snapshot(optimizer)
    for _ in range(2):  # the second finds what the first one knew
        snapshot.take()
        snapshot.release()
    state = optimizer.state[params[0]]
    if change == "list":
        state["list"].append(torch.zeros(2))
    elif change == "count":
        state["count"] = 2
    elif change == "entry":
        state["more"] = torch.ones(1)
    elif change == "tensor":
        state["exp_avg"] = torch.full((3,), 5.0)
    elif change == "data":
        state["exp_avg"].data = torch.full((3,), 5.0)
    elif change == "frozen":
        params[1].requires_grad_(False)
        params[1].grad = None
    else:
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(4))]})
    before = copy.deepcopy([optimizer.param_groups, list(optimizer.state.values())])

    snapshot.take()
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.detach().add_(1.0)
    optimizer.state[params[0]].clear()
    snapshot.restore()

    after = [optimizer.param_groups, list(optimizer.state.values())]
    if change == "frozen":  # without a gradient no optimizer moves it
        params[1].detach().copy_(before[0][0]["params"][1])
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_what_was_put_back_can_change_and_be_put_back_again():
    model = nn.Linear(3, 2)
    optimizer = Adam(model.parameters(), lr=0.1)
    fill_gradients(model.parameters())
    optimizer.step()
    snapshot = Snapshot(optimizer)
    for count in range(4):
        before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        snapshot.take()
        optimizer.step()
        for state in optimizer.state.values():
            state["count"] = torch.full((1,), float(count))
        snapshot.restore()
        torch.testing.assert_close(
            [model.state_dict(), optimizer.state_dict()], before, rtol=0, atol=0
        )
        snapshot.release()
        optimizer.step()


def test_the_copies_of_a_large_model_take_no_memory_between_steps_and_no_new_layout():
    model = nn.Linear(4100, 1400)  # over the size up to which memory is kept
    optimizer = torch.optim.Adam(model.parameters())
    snapshot = Snapshot(optimizer)
    for _ in range(2):  # the first step makes the state
        model(torch.randn(3, 4100)).sum().backward()
        snapshot.take()
        optimizer.step()
        snapshot.release()
    before = [param.detach().clone() for param in model.parameters()]
    copies = snapshot._spare[1]
    held = [storage.nbytes() for storage, _ in copies._storages]

    snapshot.take()
    optimizer.step()
    is_same_layout = snapshot._copies is copies
    snapshot.restore()
    snapshot.release()

    assert held
    assert not any(held)
    assert not any(storage.nbytes() for storage, _ in copies._storages)
    assert is_same_layout
    for param, start in zip(model.parameters(), before, strict=True):
        assert torch.equal(param, start)
