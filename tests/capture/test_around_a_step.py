"""What surrounds a step or lies inside it: autocast, inference mode, compilers, teachers."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import cross_entropy  # as scripts import it

from safestep import SafeStep

INPUTS = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def guarded(model, **options):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    return optimizer, SafeStep(optimizer, model, action="monitor", **options)


def recorded_steps(model, step, count=2, **options):
    """Return the guard and the model before the last of some recorded steps."""
    optimizer, guard = guarded(model, **options)
    before = model
    for _ in range(count):
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        guard.record(step, model)
        step(model).backward()
        optimizer.step()
    return guard, before


@pytest.mark.parametrize("is_stepped_inside", [True, False], ids=["step inside", "step outside"])
def test_r_in_an_autocast_region_is_not_that_of_cached_weights(
    is_stepped_inside, dense_normalized_step
):
    """A cast weight that autocast has cached carries no tangent and does not move."""
    model = mlp()
    optimizer, guard = guarded(model)
    for _ in range(3):
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model(INPUTS), LABELS)
            loss.backward()
            if is_stepped_inside:
                optimizer.step()
        if not is_stepped_inside:
            optimizer.step()

        expected = dense_normalized_step(before, model, INPUTS)
        assert guard.last.estimator == "jvp"
        assert guard.last.normalized_step == pytest.approx(expected, rel=0.02)  # bfloat16


def test_a_step_under_inference_mode_is_unmeasured_not_safe():
    model = mlp()
    optimizer, guard = guarded(model)
    cross_entropy(model(INPUTS), LABELS).backward()

    with torch.inference_mode(), pytest.warns(UserWarning, match="not measured and left alone"):
        optimizer.step()

    assert guard.last.status == "unmeasured"
    assert guard.last.reason


def test_a_function_that_differentiates_forward_itself_is_measured_by_difference(
    dense_normalized_step,
):
    """Dual levels do not nest, so forward mode is not there for the guard."""

    class Slope(nn.Module):
        def forward(self, hidden):
            direction = torch.ones_like(hidden)
            return hidden + torch.func.jvp(torch.tanh, (hidden,), (direction,))[1]

    model = mlp()
    model.insert(2, Slope())
    optimizer, guard = guarded(model)
    before = copy.deepcopy(model)
    cross_entropy(model(INPUTS), LABELS).backward()

    with pytest.warns(UserWarning, match=r"2 \(Slope\) has no forward-mode derivative"):
        optimizer.step()

    before[2].forward = lambda hidden: hidden + 1 - hidden.tanh() ** 2
    expected = dense_normalized_step(before, model, INPUTS)
    assert guard.last.estimator == "difference"
    assert guard.last.normalized_step == pytest.approx(expected, rel=2e-3)


def test_nothing_watches_the_users_own_calls():
    modes = []

    def step(model):
        if torch.is_grad_enabled():
            modes.append(torch.overrides._get_current_function_mode_stack())
        return cross_entropy(model(INPUTS), LABELS)

    recorded_steps(mlp(), step)

    # Once each time that the user calls it; the one look of the guard with a graph is watched.
    assert [len(stack) for stack in modes].count(0) == 2


def test_logits_of_a_teacher_do_not_count(dense_normalized_step):
    teacher = mlp().requires_grad_(False)
    teacher[2].weight.mul_(100)

    def step(model):
        wanted = (teacher(INPUTS) / 3).softmax(-1)
        given = (model(INPUTS) / 3).log_softmax(-1)
        return functional.kl_div(given, wanted, reduction="batchmean")

    model = mlp()
    guard, before = recorded_steps(model, step)

    expected = dense_normalized_step(before, model, INPUTS) / 3
    assert guard.last.normalized_step == pytest.approx(expected, rel=1e-5)


def test_the_label_smoother_of_a_hugging_face_trainer_is_measured(dense_normalized_step):
    trainer = pytest.importorskip("transformers.trainer_pt_utils")
    smoother, labels = trainer.LabelSmoother(epsilon=0.1), LABELS.clone()
    labels[:4] = -100
    inputs = INPUTS.clone()
    inputs[:4] *= 20  # padded positions would set the radius

    def step(model):
        return smoother({"logits": model(inputs)}, labels)

    model = mlp()
    guard, before = recorded_steps(model, step)

    expected = dense_normalized_step(before, model, inputs[4:])
    assert guard.last.normalized_step == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_loss_hides_the_logits_and_is_said_to():
    scripted = torch.jit.script(plain_loss)

    with pytest.warns(UserWarning, match="holds no softmax, sigmoid or log-sum-exp"):
        guard, _ = recorded_steps(mlp(), lambda model: scripted(model(INPUTS), LABELS), count=1)

    assert guard.last.status == "unmeasured"


def plain_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, labels)


def test_a_squared_error_is_left_alone_and_trains_bitwise_as_without_a_guard():
    wanted = functional.one_hot(LABELS, 3).float()
    watched, plain = mlp(), mlp()

    for model in (watched, plain):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        guard = SafeStep(optimizer, model) if model is watched else None
        for step in range(5):
            optimizer.zero_grad()
            functional.mse_loss(model(INPUTS), wanted).backward()
            if guard and step == 0:
                with pytest.warns(UserWarning, match=r"a squared error does not"):
                    optimizer.step()
            else:
                optimizer.step()
        if guard:
            assert (guard.last.status, guard.last.scale) == ("unmeasured", 1.0)
            assert "a squared error does not" in guard.last.reason

    for one, other in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("how", ["loop", "record"])
def test_harmonic_logits_have_the_radius_of_their_linearisation(how):
    """Probabilities ~ distance^-n: the softmax of -n log distance to a prototype of each class."""

    class Harmonic(nn.Module):
        def __init__(self):
            super().__init__()
            self.prototypes = nn.Parameter(
                torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
            )

        def forward(self, inputs):
            difference = inputs.unsqueeze(1) - self.prototypes
            return -2.0 * difference.square().sum(-1).log()

    model = Harmonic()
    optimizer, guard = guarded(model)
    before = model.prototypes.detach().double().clone()

    def step():
        return cross_entropy(model(INPUTS), LABELS)

    if how == "record":
        guard.record(step)
    step().backward()
    optimizer.step()

    moved = model.prototypes.detach().double() - before
    difference = INPUTS.double().unsqueeze(1) - before
    square = difference.square().sum(-1)
    tangent = 4.0 * (difference * moved).sum(-1) / square  # d(-2 log |x - w|^2), by hand
    expected = float((tangent.amax(-1) - tangent.amin(-1)).max()) / math.pi
    assert guard.last.normalized_step == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_looking_at_compiled_code_compiles_nothing_again():
    torch.compiler.reset()
    compiled = []

    def count(graph, _):
        compiled.append(graph)
        return graph.forward

    model = mlp()
    called = torch.compile(model, backend=count)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    guard = SafeStep(optimizer, called, action="monitor")
    frames = []
    for _ in range(4):
        optimizer.zero_grad()
        cross_entropy(called(INPUTS), LABELS).backward()
        optimizer.step()
        frames.append(len(compiled))

    assert guard.last.status == "ok"
    assert frames == [1, 1, 1, 1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("is_recorded", [True, False], ids=["recorded", "loop"])
def test_compiled_code_has_the_r_of_eager_code(is_recorded, dense_normalized_step):
    torch.compiler.reset()
    model = mlp()
    called = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    guard = SafeStep(optimizer, called, action="monitor")

    def step():
        return cross_entropy(called(INPUTS) / 2, LABELS)

    for _ in range(3):
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        if is_recorded:
            guard.record(step)
        step().backward()
        optimizer.step()

        expected = dense_normalized_step(before, model, INPUTS) / 2
        # A loop's temperature is read from the gradient, to three figures.
        rel = 1e-5 if is_recorded else 5e-3
        assert guard.last.normalized_step == pytest.approx(expected, rel=rel)
