"""With copy=False the update is known before the step, and is what the step then does."""

import copy
import gc
import math
from itertools import accumulate

import pytest
import torch
from helpers.compare import assert_bitwise_equal
from torch import nn, optim
from torch.autograd import forward_ad
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

from safestep import SafeStep
from safestep.guard import lookahead
from safestep.guard.lookahead import Lookahead
from safestep.measure.forward_ad import tangents_in_place
from safestep.measure.perturb import displaced_by, moved_back
from safestep.parallel.norms import joint_norm

OPTIMIZERS = {
    "sgd": lambda params, lr: optim.SGD(params, lr),
    "sgd-momentum": lambda params, lr: optim.SGD(
        params, lr, momentum=0.9, dampening=0.3, weight_decay=0.1
    ),
    "sgd-nesterov": lambda params, lr: optim.SGD(params, lr, momentum=0.9, nesterov=True),
    "sgd-foreach": lambda params, lr: optim.SGD(
        params, lr, momentum=0.9, nesterov=True, foreach=True
    ),
    "sgd-fused": lambda params, lr: optim.SGD(
        params, lr, momentum=0.9, weight_decay=0.1, fused=True
    ),
    "sgd-maximize": lambda params, lr: optim.SGD(params, lr, maximize=True, weight_decay=0.1),
    "adam": lambda params, lr: optim.Adam(params, lr),
    "adam-l2": lambda params, lr: optim.Adam(params, lr, weight_decay=0.1, betas=(0.8, 0.95)),
    "adam-amsgrad": lambda params, lr: optim.Adam(params, lr, amsgrad=True, maximize=True),
    "adam-foreach": lambda params, lr: optim.Adam(params, lr, foreach=True),
    "adam-fused": lambda params, lr: optim.Adam(params, lr, fused=True),
    "adam-tensor-lr": lambda params, lr: optim.Adam(params, torch.tensor(lr)),
    "adamw": lambda params, lr: optim.AdamW(params, lr, weight_decay=0.1, eps=1e-3),
    "adamw-foreach": lambda params, lr: optim.AdamW(params, lr, amsgrad=True, foreach=True),
    "muon": lambda params, lr: optim.Muon(matrices(params), lr),
    "muon-adjusted": lambda params, lr: optim.Muon(
        matrices(params), lr, nesterov=False, adjust_lr_fn="match_rms_adamw", weight_decay=0.0
    ),
}


def matrices(params):
    return [param for param in params if param.ndim == 2]


def make_params(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (7,), (200, 33), (), (4, 3, 3, 3), (9,), (1, 3)]
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    tensors[4] = tensors[4].to(memory_format=torch.channels_last)
    return [nn.Parameter(tensor) for tensor in tensors]


def fill_gradients(params, step, *, missing=((1, 1), (2, 0), (5, 3))):
    generator = torch.Generator().manual_seed(step)
    for index, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param)
        param.grad = None if (index, step) in missing else grad


def numbers_of(model, optimizer):
    return copy.deepcopy([model.state_dict(), optimizer.state_dict()])


@pytest.mark.parametrize("piece", [1, 64, 2**16], ids=lambda piece: f"pieces-of-{piece}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_found_ahead_is_the_one_that_the_step_makes(name, dtype, piece, monkeypatch):
    monkeypatch.setattr(lookahead, "MIN_PIECE", piece)
    params = make_params(dtype)
    optimizer = OPTIMIZERS[name](params[:3], 0.1)
    if "muon" not in name:
        optimizer.add_param_group({"params": params[3:], "lr": 0.03, "weight_decay": 0.02})
    ahead = Lookahead(optimizer)

    for step in range(5):
        # torch's fused SGD fails where the momentum of some parameters begins later.
        fill_gradients(params, step, **({"missing": ((1, 1),)} if name == "sgd-fused" else {}))
        ahead.take()
        update = ahead.update([])
        change, norm = list(update.change), joint_norm(update.parts())
        stepped = list(update.params)
        before = [param.detach().clone() for param in stepped]
        optimizer.step()

        assert len(change) == len(stepped) > 0
        for start, param, found in zip(before, stepped, change, strict=True):
            made = param.detach() - start
            assert found.stride() == param.stride()
            # float32: a piece is rounded like a whole, but for kernels with their own remainders
            tolerance = 1e-12 if dtype is torch.float64 else 1e-6
            assert (found - made).norm() <= tolerance * made.norm()
        whole = torch.cat(
            [(p.detach() - b).flatten() for p, b in zip(stepped, before, strict=True)]
        )
        # The norm of a float32 tensor is summed up in float32.
        assert norm.item() == pytest.approx(whole.double().norm().item(), rel=1e-5)
        ahead.release()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_looking_ahead_changes_nothing(name):
    params = make_params(torch.float32)
    optimizer = OPTIMIZERS[name](params, 0.1)
    for step in (4, 5):
        fill_gradients(params, step)
        optimizer.step()
    fill_gradients(params, 1)
    ahead = Lookahead(optimizer)
    kept = [param.grad for param in params]
    before = copy.deepcopy([params, optimizer.state_dict(), kept])
    versions = [param._version for param in params]

    ahead.take()
    ahead.update([]).parts()
    ahead.release()

    now = [params, optimizer.state_dict(), kept]
    for numbers in (now, before):
        for group in numbers[1]["param_groups"]:
            group.pop("adjust_lr_fn", None)  # a string
    assert_bitwise_equal(now, before, equal_nan=True)
    assert [param._version for param in params] == versions
    assert all(param.grad is grad for param, grad in zip(params, kept, strict=True))


def test_looking_ahead_to_the_first_step_leaves_no_state_behind():
    params = make_params(torch.float32)
    optimizer = optim.Adam(params)
    fill_gradients(params, 4)
    ahead = Lookahead(optimizer)

    ahead.take()
    list(ahead.update([]).change)

    assert not optimizer.state


def test_looking_ahead_holds_a_small_part_of_the_model():
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(2)))
    optimizer = optim.AdamW(model.parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    size = sum(param.nbytes for param in model.parameters())

    def live_bytes():
        found = {
            each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
            for each in gc.get_objects()
            if type(each) in (torch.Tensor, nn.Parameter)
        }
        return sum(found.values())

    ahead = Lookahead(optimizer)
    ahead.take()
    ahead.update([])
    gc.collect()
    before = live_bytes()
    # Two pieces may be alive at once, of 2**14 elements at least: a part in 32 of this model.
    extra = max(live_bytes() - before for _ in ahead.pieces())

    assert size / 32 <= extra <= size / 16 * 1.01


def peak_of(function):
    """Return the most bytes that are alive at once of those that a call allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(change for _, change in changes))


def test_a_measured_step_holds_the_update_once():
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(2)))
    optimizer = optim.AdamW(model.parameters())
    for step in range(2):
        fill_gradients(list(model.parameters()), step, missing=())
        optimizer.step()
    ahead = Lookahead(optimizer)
    ahead.take()
    params, change = list(model.parameters()), ahead.update([]).change
    start = [param.detach().clone() for param in params]
    found = []

    @torch.no_grad()
    def carry_tangents(look=lambda: None):
        with tangents_in_place(params, change):
            look()

    @torch.no_grad()
    def go_ahead():
        found[:] = displaced_by(list(map(torch.Tensor.detach, params)), change, 0.5)
        with moved_back(params, found):
            pass

    size = sum(param.nbytes for param in params)
    assert size < peak_of(carry_tangents) < 1.2 * size
    assert size < peak_of(go_ahead) < 1.3 * size
    assert_bitwise_equal(
        found, [q + 0.5 * p for q, p in zip(start, change, strict=True)], equal_nan=True
    )
    carry_tangents(lambda: found.extend(forward_ad.unpack_dual(p).tangent for p in params))
    assert_bitwise_equal(found[len(params) :], list(change), equal_nan=True)
    assert_bitwise_equal(list(map(torch.Tensor.detach, params)), start, equal_nan=True)


def test_updates_of_sparse_gradients_are_found_ahead_too():
    table = nn.Embedding(9, 4, sparse=True)
    optimizer = optim.SGD(table.parameters(), lr=0.1, momentum=0.9)
    ahead = Lookahead(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        (table(torch.tensor([1, 2, 2])) ** 2).sum().backward()
        before = table.weight.detach().clone()
        ahead.take()
        (change,) = ahead.update([]).change
        optimizer.step()

        torch.testing.assert_close(table.weight.detach() - before, change)


def test_hooks_on_every_optimizer_do_not_see_a_look_ahead():
    seen = []
    handle = register_optimizer_step_pre_hook(lambda *_: seen.append("step"))
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    ahead = Lookahead(optim.SGD([param], lr=0.1))
    ahead.take()

    list(ahead.update([]).change)

    handle.remove()
    assert seen == []


@pytest.mark.parametrize("kind", [optim.RMSprop, optim.LBFGS, type("Mine", (optim.SGD,), {})])
def test_an_optimizer_whose_update_is_not_known_ahead_is_refused(kind, make_model):
    model = make_model("linear")

    with pytest.raises(ValueError, match=rf"with copy=False, got {kind.__name__}\. Leave `copy`"):
        SafeStep(kind(model.parameters(), lr=0.1), model, copy=False)


@pytest.mark.parametrize("estimator", ["jvp", "auto"])
@pytest.mark.parametrize("name", ["dropout", "residual", "attention-dropout"])
def test_training_is_bitwise_the_same_over_200_steps(
    name, estimator, make_model, make_batch, train_step
):
    models = [make_model(name), make_model(name)]
    optimizers = [optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.1) for m in models]
    guard = SafeStep(optimizers[0], models[0], estimator=estimator, copy=False)
    flat = (lambda model: lambda inputs: model(inputs).flatten(0, -2)) if "attention" in name else (
        lambda model: model
    )  # fmt: skip
    losses, statuses, estimators = [[], []], set(), set()

    for index, (optimizer, model) in enumerate(zip(optimizers, models, strict=True)):
        torch.manual_seed(7)
        for seed in range(200):
            inputs, targets = make_batch(name, seed=seed)
            losses[index].append(
                train_step(optimizer, flat(model), (inputs, targets.flatten())).detach()
            )
            if index == 0:
                statuses.add(guard.last.status)
                estimators.add(guard.last.estimator)

    assert statuses == {"ok"}
    assert ("predicted" in estimators) == (estimator == "auto")
    assert_bitwise_equal(losses[0], losses[1], equal_nan=True)
    assert_bitwise_equal(
        *(numbers_of(m, o) for m, o in zip(models, optimizers, strict=True)), equal_nan=True
    )


@pytest.mark.parametrize("lr", [100.0, 1e12], ids=str)
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "muon" not in name])
def test_a_step_over_the_limit_lands_on_it_however_long(
    name, lr, make_model, make_batch, dense_normalized_step, train_step
):
    model, batch = make_model("multilayer"), make_batch("multilayer")
    optimizer = OPTIMIZERS[name](model.parameters(), lr)
    guard = SafeStep(optimizer, model, copy=False)

    for step in range(4):
        before = copy.deepcopy(model)
        train_step(optimizer, model, batch)

        if guard.last.status == "clipped":
            applied = dense_normalized_step(before, model, batch[0])
            assert applied == pytest.approx(1.0, rel=1e-4)
        assert step > 0 or guard.last.status == "clipped"
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(lr)


@pytest.mark.parametrize("estimator", ["jvp", "auto", "secant"])
def test_muon_beside_adamw_is_clipped_as_with_a_copy(estimator, make_model, make_batch):
    batch, results = make_batch("multilayer"), []
    for copies in (True, False):
        model = make_model("multilayer")
        vectors = [param for param in model.parameters() if param.ndim != 2]
        optimizers = optim.Muon(matrices(model.parameters()), lr=100), optim.AdamW(vectors, lr=10)
        guards = [
            SafeStep(each, model, max_normalized_step=0.05, estimator=estimator, copy=copies)
            for each in optimizers
        ]
        for _ in range(3):
            cross_entropy(model(batch[0]), batch[1]).backward()
            for optimizer, guard in zip(optimizers, guards, strict=True):
                optimizer.step()
                assert guard.last.status == "clipped"
            model.zero_grad()
        results.append([numbers_of(model, each) for each in optimizers])

    # Three clipped steps in float32; Muon's orthogonalisation is in bfloat16.
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("action", ["clip", "set"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "muon" not in name])
def test_a_scaled_step_is_the_one_that_a_copy_allows(
    name, action, make_model, make_batch, train_step
):
    batch, results = make_batch("multilayer"), []
    for copies in (True, False):
        model = make_model("multilayer").double()
        optimizer = OPTIMIZERS[name](model.parameters(), 0.5)
        guard = SafeStep(optimizer, model, max_normalized_step=0.5, action=action, copy=copies)
        reports = []
        for _ in range(3):
            train_step(optimizer, model, (batch[0].double(), batch[1]))
            reports.append(guard.last)
        results.append((numbers_of(model, optimizer), reports))

    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert other.status == one.status
        assert other.scale == pytest.approx(one.scale, rel=1e-7)  # measured in float32 parts
        assert other.step_norm == pytest.approx(one.step_norm, rel=1e-7)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("is_first", [True, False], ids=["first-step", "later-step"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "muon" not in name])
def test_a_gradient_that_is_not_finite_touches_nothing(
    name, is_first, make_model, make_batch, train_step
):
    model, batch = make_model("multilayer"), make_batch("multilayer")
    optimizer = OPTIMIZERS[name](model.parameters(), 0.01)
    guard = SafeStep(optimizer, model, copy=False)
    for _ in range(0 if is_first else 3):
        train_step(optimizer, model, batch)
    before = numbers_of(model, optimizer)

    train_step(optimizer, model, (batch[0] / 0.0, batch[1]))

    assert guard.last.status == "skipped"
    assert guard.last.reason.startswith("the gradient is not finite: 0.weight")
    assert_bitwise_equal(numbers_of(model, optimizer), before, equal_nan=True)
    assert all(param.grad is not None for param in model.parameters())
    train_step(optimizer, model, batch)
    assert guard.last.status in ("ok", "clipped")


@pytest.mark.parametrize("lr", [math.inf, math.nan, 1e30], ids=str)
def test_an_update_that_is_not_finite_does_not_happen(lr, make_model, make_batch, train_step):
    model, batch = make_model("linear"), make_batch("linear")
    optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    guard = SafeStep(optimizer, model, copy=False)
    train_step(optimizer, model, batch)
    optimizer.param_groups[0]["lr"] = lr
    before = numbers_of(model, optimizer)

    train_step(optimizer, model, batch)

    assert guard.last.status == "skipped"
    assert guard.last.reason.startswith("the update is not finite: weight")
    assert_bitwise_equal(numbers_of(model, optimizer), before, equal_nan=True)


def test_monitor_lets_a_broken_step_pass(make_model, make_batch, train_step):
    model, batch = make_model("linear"), make_batch("linear")
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    SafeStep(optimizer, model, action="monitor", copy=False)

    with pytest.warns(UserWarning, match="left alone: the gradient is not finite"):
        train_step(optimizer, model, (batch[0] * math.nan, batch[1]))

    assert model.weight.isnan().any()


@pytest.mark.parametrize("is_keyword", [False, True], ids=["positional", "keyword"])
@pytest.mark.parametrize("spoil", [1.0, math.nan], ids=["long", "broken"])
def test_a_closure_is_judged_before_the_optimizer_goes_on(
    is_keyword, spoil, make_model, make_batch, dense_normalized_step
):
    model, (inputs, targets) = make_model("multilayer"), make_batch("multilayer")
    optimizer = optim.SGD(model.parameters(), lr=100.0, momentum=0.9)
    guard = SafeStep(optimizer, model, copy=False)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        (loss * spoil).backward()
        return loss

    before = copy.deepcopy(model)
    loss = optimizer.step(closure=closure) if is_keyword else optimizer.step(closure)

    assert loss.requires_grad
    assert optimizer.param_groups[0]["lr"] == 100.0
    if spoil == 1.0:
        assert guard.last.status == "clipped"
        applied = dense_normalized_step(before, model, inputs)
        assert applied == pytest.approx(1.0, rel=1e-4)
    else:
        assert guard.last.status == "skipped"
        assert_bitwise_equal(model.state_dict(), before.state_dict(), equal_nan=True)
        assert not optimizer.state


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_gradients_that_a_scaler_leaves_scaled_are_understood(
    fused, make_model, make_batch, dense_normalized_step
):
    model, (inputs, targets) = make_model("multilayer"), make_batch("multilayer")
    optimizer = optim.Adam(model.parameters(), lr=1.0, eps=1.0, fused=fused)
    guard = SafeStep(optimizer, model, copy=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = copy.deepcopy(model)

    scaler.scale(cross_entropy(model(inputs), targets)).backward()
    scaler.step(optimizer)
    scaler.update()

    # Adam with a large eps moves by about the gradient, which is 1024 times as large here.
    applied = dense_normalized_step(before, model, inputs)
    expected = min(1.0, guard.last.normalized_step)
    assert applied == pytest.approx(expected, rel=1e-3)
    assert guard.last.status in ("ok", "clipped")


def test_a_step_that_raises_gives_learning_rate_and_gradients_back(make_model, make_batch):
    model, (inputs, targets) = make_model("multilayer"), make_batch("multilayer")
    optimizer = optim.SGD(model.parameters(), lr=100.0)
    guard = SafeStep(optimizer, model, copy=False)

    def fail(*_):
        raise RuntimeError("another hook")

    handle = optimizer.register_step_pre_hook(fail)
    cross_entropy(model(inputs), targets).backward()
    with pytest.raises(RuntimeError, match="another hook"):
        optimizer.step()
    handle.remove()
    assert optimizer.param_groups[0]["lr"] < 100.0

    guard.detach()

    assert optimizer.param_groups[0]["lr"] == 100.0
