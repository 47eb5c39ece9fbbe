"""Training loops as people write them: schedulers, scalers, accumulation, wrappers, accidents."""

import copy

import pytest
import torch
from torch import nn, optim
from torch.nn.functional import cross_entropy

from safestep import SafeStep


@pytest.mark.parametrize("is_guarded_first", [True, False], ids=["after-guard", "before-guard"])
def test_a_scheduler_sees_the_steps_and_the_guard_its_learning_rates(
    is_guarded_first, model, batch, train_step
):
    optimizer = optim.SGD(model.parameters(), lr=100.0)
    guard = SafeStep(optimizer, model) if is_guarded_first else None
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    guard = guard or SafeStep(optimizer, model)
    rates = []

    for _ in range(3):
        train_step(optimizer, model, batch)
        scheduler.step()
        rates.append(guard.last.learning_rate)

    # A scheduler warns, here an error, where it sees no optimizer step before its own.
    assert rates == pytest.approx([100.0, 10.0, 1.0])
    assert guard.last.step == 2


def test_a_scheduler_that_saw_a_skipped_step_goes_on(model, batch, train_step):
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    guard = SafeStep(optimizer, model)

    train_step(optimizer, model, (batch[0] * torch.nan, batch[1]))
    scheduler.step()

    assert guard.last.status == "skipped"
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_accumulated_micro_batches_are_measured_together(model, make_batch, dense_normalized_step):
    batches = [make_batch("multilayer", seed=seed) for seed in range(3)]
    batches[1][0].mul_(5.0)
    optimizer = optim.SGD(model.parameters(), lr=100.0)
    guard = SafeStep(optimizer, model)

    for _ in range(2):
        before = copy.deepcopy(model)
        for inputs, targets in batches:
            (cross_entropy(model(inputs), targets) / 3).backward()
        with torch.no_grad():
            model(torch.full((6, 5), 1e6))  # an evaluation on other data counts for nothing
        model(torch.full((6, 5), 1e6))  # nor does a forward pass that no gradient comes back from
        optimizer.step()
        optimizer.zero_grad()

        applied = dense_normalized_step(before, model, *(inputs for inputs, _ in batches))
        assert guard.last.status == "clipped"
        assert applied == pytest.approx(1.0, rel=1e-4)


def scaled_step(scaler, optimizer, model, batch, *, unscale=False):
    optimizer.zero_grad()
    scaler.scale(cross_entropy(model(batch[0]), batch[1])).backward()
    if unscale:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("is_fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled"])
def test_a_scaled_step_is_clipped_to_the_limit(
    unscale, is_fused, model, batch, dense_normalized_step
):
    optimizer = optim.Adam(model.parameters(), lr=10.0, fused=is_fused)
    guard, scaler = SafeStep(optimizer, model), torch.amp.GradScaler("cpu")

    for _ in range(3):
        before = copy.deepcopy(model)
        scaled_step(scaler, optimizer, model, batch, unscale=unscale)

        assert guard.last.status == "clipped"
        assert dense_normalized_step(before, model, batch[0]) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("is_fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled"])
def test_a_step_that_the_scaler_leaves_out_leaves_no_trace(
    unscale, is_fused, model, batch, dense_normalized_step
):
    optimizer = optim.Adam(model.parameters(), lr=10.0, fused=is_fused)
    guard, scaler = SafeStep(optimizer, model), torch.amp.GradScaler("cpu")
    scaled_step(scaler, optimizer, model, batch)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    scale = scaler.get_scale()

    huge = (torch.full_like(batch[0], torch.inf), batch[1])
    scaled_step(scaler, optimizer, model, huge, unscale=unscale)

    assert scaler.get_scale() == scale / 2
    torch.testing.assert_close([model.state_dict(), optimizer.state_dict()], before, rtol=0, atol=0)
    # A fused optimizer runs, and leaves the parameters alone by itself.
    assert guard.last.step == int(is_fused)
    assert guard.last.status == ("skipped" if is_fused else "clipped")

    start = copy.deepcopy(model)
    scaled_step(scaler, optimizer, model, batch)
    assert dense_normalized_step(start, model, batch[0]) == pytest.approx(1.0, rel=1e-4)


def test_micro_batches_of_a_step_that_the_scaler_left_out_do_not_count(
    model, batch, dense_normalized_step
):
    optimizer = optim.SGD(model.parameters(), lr=100.0)
    guard, scaler = SafeStep(optimizer, model), torch.amp.GradScaler("cpu")
    steep = (batch[0] * 1e4, batch[1])
    scaler.scale(cross_entropy(model(steep[0]), steep[1])).backward()
    scaler.scale(cross_entropy(model(batch[0]), batch[1]) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert guard.last is None

    before = copy.deepcopy(model)
    scaled_step(scaler, optimizer, model, batch)

    assert dense_normalized_step(before, model, batch[0]) == pytest.approx(1.0, rel=1e-4)


def test_a_step_that_raises_is_forgotten_and_the_next_one_is_guarded(
    model, batch, train_step, dense_normalized_step
):
    class Moody(optim.SGD):
        is_moody = True

        def step(self, closure=None):
            with torch.no_grad():
                self.param_groups[0]["params"][0].mul_(0.9)
            if self.is_moody:
                raise OSError("not today")
            return super().step(closure)

    optimizer = Moody(model.parameters(), lr=100.0)
    guard = SafeStep(optimizer, model)
    with pytest.raises(OSError, match="not today"):
        train_step(optimizer, model, batch)
    assert guard.last is None

    optimizer.is_moody = False
    before = copy.deepcopy(model)
    train_step(optimizer, model, batch)

    assert (guard.last.step, guard.last.status) == (0, "clipped")
    assert dense_normalized_step(before, model, batch[0]) == pytest.approx(1.0, rel=1e-4)


def test_what_a_subclass_does_around_the_step_it_inherits_is_part_of_the_step(
    model, batch, train_step, dense_normalized_step
):
    class DecayedSGD(optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                for param in self.param_groups[0]["params"]:
                    param.mul_(0.5)
            result = super().step(closure)
            with torch.no_grad():
                for param in self.param_groups[0]["params"]:
                    param.add_(0.1)
            return result

    optim.SGD(model.parameters())  # from now on torch calls the hooks in SGD.step as well
    optimizer = DecayedSGD(model.parameters(), lr=100.0)
    guard = SafeStep(optimizer, model)

    for step in range(2):
        before = copy.deepcopy(model)
        train_step(optimizer, model, batch)

        assert (guard.last.step, guard.last.status) == (step, "clipped")
        assert dense_normalized_step(before, model, batch[0]) == pytest.approx(1.0, rel=1e-4)


def test_a_step_that_raises_before_the_guard_is_disabled_is_forgotten(model, batch, train_step):
    class Moody(optim.SGD):
        def step(self, closure=None):
            if closure is None:
                raise OSError("not today")
            return super().step()

    optimizer = Moody(model.parameters(), lr=100.0)
    guard = SafeStep(optimizer, model)
    with pytest.raises(OSError, match="not today"):
        train_step(optimizer, model, batch)

    guard.enabled = False
    optimizer.step(lambda: None)

    assert guard.last is None


def test_an_accelerated_optimizer_is_guarded_where_it_really_steps(
    model, batch, dense_normalized_step
):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    guarded, optimizer = accelerator.prepare(model, optim.AdamW(model.parameters(), lr=10.0))
    guard = SafeStep(optimizer, guarded)
    before = copy.deepcopy(model)

    optimizer.zero_grad()
    accelerator.backward(cross_entropy(guarded(batch[0]), batch[1]))
    optimizer.step()

    assert guard.optimizer is optimizer.optimizer
    assert guard.last.status == "clipped"
    assert dense_normalized_step(before, model, batch[0]) == pytest.approx(1.0, rel=1e-4)


def test_two_models_trained_in_turn_do_not_see_each_other(
    make_model, make_batch, train_step, dense_normalized_step
):
    models = make_model("multilayer"), make_model("residual")
    batches = make_batch("multilayer"), make_batch("residual")
    optimizers = [optim.Adam(model.parameters(), lr=10.0) for model in models]
    guards = [SafeStep(*pair) for pair in zip(optimizers, models, strict=True)]

    for step in range(2):
        for guard, optimizer, model, batch in zip(guards, optimizers, models, batches, strict=True):
            before = copy.deepcopy(model)
            train_step(optimizer, model, batch)
            assert guard.last.step == step
            assert dense_normalized_step(before, model, batch[0]) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(("dtype", "logit"), [(torch.float32, 200.0), (torch.float16, 30.0)])
def test_a_row_that_is_fitted_to_the_last_bit_still_limits_the_step(dtype, logit):
    model = nn.Linear(4, 3, bias=False).to(dtype)
    nn.init.eye_(model.weight)
    inputs, targets = torch.eye(4, dtype=dtype)[:3], torch.tensor([0, 2, 1])
    inputs[0] *= logit  # no gradient is left of it, and weight decay moves it most
    optimizer = optim.SGD(model.parameters(), lr=0.5, weight_decay=0.8)
    guard = SafeStep(optimizer, model)
    before = model.weight.detach().clone()

    cross_entropy(model(inputs).float(), targets).backward()
    optimizer.step()

    tangent = inputs.float() @ (model.weight - before).T.float()
    spread = (tangent.amax(-1) - tangent.amin(-1)).max().item()
    assert guard.last.status == "clipped"
    assert spread == pytest.approx(torch.pi, rel=0.01)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_optimizer_step_is_guarded(backend, model, batch, dense_normalized_step):
    optimizer = optim.Adam(model.parameters(), lr=10.0)
    guard = SafeStep(optimizer, model)
    step = torch.compile(optimizer.step, backend=backend)

    for index in range(3):
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        step()

        assert (guard.last.step, guard.last.status) == (index, "clipped")
        assert dense_normalized_step(before, model, batch[0]) == pytest.approx(1.0, rel=1e-4)


def test_a_gradient_that_was_cleared_does_not_count(dense_normalized_step):
    """A generator's loss leaves a gradient in the discriminator, which clears it before its own."""
    torch.manual_seed(0)
    generator, discriminator = nn.Linear(2, 4), nn.Linear(4, 2)
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.1)
    guard = SafeStep(optimizer, discriminator, action="monitor", logits=lambda output: output)
    cross_entropy(
        discriminator(generator(100 * torch.randn(3, 2))), torch.ones(3).long()
    ).backward()

    halves = [torch.randn(3, 4), torch.randn(3, 4)]
    outputs = [discriminator(half) for half in halves]  # both before the gradient is cleared
    optimizer.zero_grad()
    before = copy.deepcopy(discriminator)
    sum(cross_entropy(output, torch.tensor([0, 1, 0])) for output in outputs).backward()
    optimizer.step()

    expected = dense_normalized_step(before, discriminator, *halves)
    assert guard.last.normalized_step == pytest.approx(expected, rel=1e-4)  # float32


@pytest.mark.parametrize("set_to_none", [True, False], ids=["none", "zeros"])
@pytest.mark.parametrize("num_batches", [1, 2], ids=["one batch", "accumulated"])
def test_a_backward_pass_that_was_given_up_does_not_count(
    set_to_none, num_batches, dense_normalized_step
):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, model, action="monitor")
    labels = torch.tensor([0, 1, 2])
    given_up, *batches = [100 * torch.randn(3, 4), *torch.randn(num_batches, 3, 4)]
    cross_entropy(model(given_up), labels).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    before = copy.deepcopy(model)

    for batch in batches:
        cross_entropy(model(batch), labels).backward()
    optimizer.step()

    expected = dense_normalized_step(before, model, *batches)
    assert guard.last.normalized_step == pytest.approx(expected, rel=1e-4)  # float32
