"""What gradients show about outputs: over all backward passes, and only where they train."""

import contextlib
import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from safestep import SafeStep

_random = torch.Generator().manual_seed(11)
INPUTS = torch.randn(8, 4, generator=_random)
INPUTS[:4] *= 6  # their logits move most
LABELS = torch.randint(0, 5, (8,), generator=_random)
FORBIDDEN = torch.rand(8, 5, generator=_random) < 0.5
FORBIDDEN[torch.arange(8), LABELS] = False
FORBIDDEN[torch.arange(8), (LABELS + 1) % 5] = False


def model(classes=5):
    return nn.Linear(4, classes)


def compared(backward, network=None, *, steps=3, **options):
    """Train with and without a guard; return the guard and the last step's tangent in float64."""
    torch.manual_seed(0)
    network = network or model()
    twin = copy.deepcopy(network)
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.02) for each in (network, twin)]
    guard = SafeStep(optimizers[0], network, action="monitor", **options)
    for _ in range(steps):
        before = copy.deepcopy(network).double()
        for each, optimizer in zip((network, twin), optimizers, strict=True):
            optimizer.zero_grad()
            backward(each)
            optimizer.step()
    for one, other in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        after = copy.deepcopy(network).double()
        return guard, after(INPUTS.double()) - before(INPUTS.double())  # the model is linear


def spread(tangent, mask=None):
    low = tangent if mask is None else tangent.masked_fill(mask, math.inf)
    high = tangent if mask is None else tangent.masked_fill(mask, -math.inf)
    return float((high.amax(-1) - low.amin(-1)).max()) / math.pi


def by_halves(network):
    logits = network(INPUTS)
    functional.cross_entropy(logits[:4], LABELS[:4]).backward(retain_graph=True)
    functional.cross_entropy(logits[4:], LABELS[4:]).backward()


def by_example(network):
    logits = network(INPUTS)
    for row in range(8):
        functional.cross_entropy(logits[row], LABELS[row]).backward(retain_graph=row < 7)


def surgery(network):
    """Gradients of two tasks, of a forward pass each, put aside and joined as in PCGrad."""
    outputs = network(INPUTS[:4]), network(INPUTS[4:])
    gradients = []
    for logits, labels in zip(outputs, LABELS.split(4), strict=True):
        network.zero_grad()
        functional.cross_entropy(logits, labels).backward()
        gradients.append([param.grad for param in network.parameters()])
    for param, *grads in zip(network.parameters(), *gradients, strict=True):
        param.grad = sum(grads)


def surgery_without_none(network):
    outputs = network(INPUTS[:4]), network(INPUTS[4:])
    gradients = []
    for logits, labels in zip(outputs, LABELS.split(4), strict=True):
        network.zero_grad(set_to_none=False)
        functional.cross_entropy(logits, labels).backward()
        gradients.append([param.grad.clone() for param in network.parameters()])
    for param, *grads in zip(network.parameters(), *gradients, strict=True):
        param.grad = sum(grads)


def asked_for(network):
    params = list(network.parameters())
    loss = functional.cross_entropy(network(INPUTS), LABELS)
    for param, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
        param.grad = gradient


@pytest.mark.parametrize("estimator", ["jvp", "auto"])
@pytest.mark.parametrize(
    "backward", [by_halves, by_example, surgery, surgery_without_none, asked_for]
)
def test_rows_of_all_backward_passes_count(backward, estimator):
    guard, tangent = compared(backward, estimator=estimator)

    assert guard.last.normalized_step == pytest.approx(spread(tangent), rel=1e-4)


def test_elements_of_all_backward_passes_of_a_binary_loss_count():
    labels = functional.one_hot(LABELS, 5).float()

    def backward(network):
        loss = functional.binary_cross_entropy_with_logits
        logits = network(INPUTS)
        loss(logits[4:], labels[4:]).backward(retain_graph=True)
        loss(logits[:4], labels[:4]).backward()

    guard, tangent = compared(backward)

    expected = float(tangent.abs().max()) / math.pi
    assert guard.last.normalized_step == pytest.approx(expected, rel=1e-4)


def test_a_step_left_out_by_a_scaler_still_voids_its_calls():
    """Unlike those of gradient surgery, its gradients were cleared before the next forward pass."""

    def backward(network):
        network(100 * INPUTS).sum().backward()
        network.zero_grad()
        functional.cross_entropy(network(INPUTS), LABELS).backward()

    guard, tangent = compared(backward)

    assert guard.last.normalized_step == pytest.approx(spread(tangent), rel=1e-4)


def saliency(network):
    inputs = (100 * INPUTS).requires_grad_()
    torch.autograd.grad(network(inputs)[:, 0].sum(), inputs)


def saliency_of_a_backward(network):
    inputs = (100 * INPUTS).requires_grad_()
    network(inputs)[:, 0].sum().backward(inputs=[inputs])


def saliency_of_frozen(network):
    inputs = (100 * INPUTS).requires_grad_()
    network.requires_grad_(False)
    network(inputs)[:, 0].sum().backward()
    network.requires_grad_(True)


@pytest.mark.parametrize("is_before", [True, False])
@pytest.mark.parametrize("explain", [saliency, saliency_of_a_backward, saliency_of_frozen])
def test_gradients_taken_for_something_else_do_not_count(explain, is_before):
    def backward(network):
        if is_before:
            explain(network)
        functional.cross_entropy(network(INPUTS), LABELS).backward()
        if not is_before:
            explain(network)

    guard, tangent = compared(backward)

    assert guard.last.normalized_step == pytest.approx(spread(tangent), rel=1e-4)


def test_a_gradient_of_the_output_that_was_used_for_training_does_not_mix_with_saliency():
    def backward(network):
        inputs = INPUTS.clone().requires_grad_()
        logits = network(inputs)
        torch.autograd.grad(logits[:4, 0].sum(), inputs, retain_graph=True)
        functional.cross_entropy(logits[4:], LABELS[4:]).backward()

    guard, tangent = compared(backward)

    assert guard.last.normalized_step == pytest.approx(spread(tangent[4:]), rel=1e-4)


def test_a_gradient_penalty_counts_what_the_loss_reads():
    def backward(network):
        inputs = INPUTS.clone().requires_grad_()
        logits = network(inputs)
        (gradient,) = torch.autograd.grad(logits.logsumexp(-1).sum(), inputs, create_graph=True)
        penalty = (gradient.norm(dim=-1) - 1).square().mean()
        (functional.cross_entropy(logits, LABELS) + 0 * penalty).backward()

    guard, tangent = compared(backward)

    assert guard.last.normalized_step == pytest.approx(spread(tangent), rel=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_model_is_still_seen_to_train(use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model()

        def forward(self, inputs):
            inputs = inputs.clone().requires_grad_()
            return torch.utils.checkpoint.checkpoint(
                self.inner, inputs, use_reentrant=use_reentrant
            )

    guard, tangent = compared(
        lambda network: functional.cross_entropy(network(INPUTS), LABELS).backward(),
        Checkpointed(),
    )

    assert guard.last.normalized_step == pytest.approx(spread(tangent), rel=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("labels", ["one", "binary"])
def test_a_temperature_in_place_is_found(labels, temperature):
    many = functional.one_hot(LABELS, 5).float()

    def backward(network):
        logits = network(INPUTS)
        logits /= temperature
        if labels == "one":
            functional.cross_entropy(logits, LABELS).backward()
        else:
            functional.binary_cross_entropy_with_logits(logits, many).backward()

    guard, tangent = compared(backward)

    size = spread(tangent) if labels == "one" else float(tangent.abs().max()) / math.pi
    assert guard.last.normalized_step == pytest.approx(size / temperature, rel=1e-2)


@pytest.mark.parametrize("labels", ["one", "binary"])
def test_a_temperature_that_changes_is_followed(labels):
    many = functional.one_hot(LABELS, 5).float()
    temperatures = []

    def backward(network):
        temperatures.append(2.0 - 0.25 * (len(temperatures) // 2))
        logits = network(INPUTS) / temperatures[-1]
        if labels == "one":
            functional.cross_entropy(logits, LABELS).backward()
        else:
            functional.binary_cross_entropy_with_logits(logits, many).backward()

    guard, tangent = compared(backward, steps=4)  # all exact

    size = spread(tangent) if labels == "one" else float(tangent.abs().max()) / math.pi
    assert guard.last.normalized_step == pytest.approx(size / temperatures[-1], rel=1e-2)


@pytest.mark.filterwarnings("ignore:SafeStep. a step was not measured")
def test_an_output_changed_in_place_before_soft_labels_is_not_measured():
    """Nothing shows the temperature then, and that there is one is known."""
    soft = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)).softmax(-1)

    def backward(network):
        logits = network(INPUTS)
        logits /= 0.3
        functional.cross_entropy(logits, soft).backward()

    guard, _ = compared(backward)

    assert guard.last.status == "unmeasured"
    assert "changed in place" in guard.last.reason
    assert "logits=" in guard.last.reason


@pytest.mark.filterwarnings("ignore:SafeStep. a step was not measured")
def test_a_loss_that_becomes_another_one_is_not_measured_as_the_first():
    steps = []

    def backward(network):
        steps.append(None)
        logits = network(INPUTS)
        if len(steps) <= 4:
            functional.cross_entropy(logits, LABELS).backward()
        else:
            (logits - 1).square().mean().backward()

    guard, _ = compared(backward, estimator="jvp")

    assert guard.last.status == "unmeasured"
    assert "the loss holds no softmax" in guard.last.reason


def test_a_head_without_a_gradient_at_first_is_measured_once_it_has_one():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 5), nn.Linear(4, 5)

        def forward(self, inputs):
            return self.one(inputs), 3 * self.two(inputs)

    steps = []

    def backward(network):
        steps.append(None)
        first, second = network(INPUTS)
        labels = LABELS if len(steps) > 2 else torch.full_like(LABELS, -100)
        loss = functional.cross_entropy(second, labels, reduction="sum")
        (functional.cross_entropy(first, LABELS) + loss / 8).backward()

    torch.manual_seed(0)
    network = Heads()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
    guard = SafeStep(optimizer, network, action="monitor")
    for _ in range(2):
        before = copy.deepcopy(network).double()
        optimizer.zero_grad()
        backward(network)
        optimizer.step()

    with torch.no_grad():
        pairs = zip(network.double()(INPUTS.double()), before(INPUTS.double()), strict=True)
        expected = max(spread(new - old) for new, old in pairs)
    assert guard.last.normalized_step == pytest.approx(expected, rel=1e-4)


class Recursive(nn.Module):
    """Calls itself on the two halves of its input, as a network over trees does."""

    def __init__(self, fails=False):
        super().__init__()
        self.leaf, self.join, self.head = nn.Linear(4, 6), nn.Linear(12, 6), nn.Linear(6, 5)
        self.fails = fails

    def forward(self, inputs, depth=2):
        if depth == 0:
            return self.leaf(inputs)
        if self.fails and depth == 1:
            with contextlib.suppress(RuntimeError):
                self(inputs[:, :1], depth - 1)
        halves = [self(each, depth - 1) for each in (inputs, inputs.flip(0))]
        joined = self.join(torch.cat(halves, -1))
        return self.head(joined) if depth == 2 else joined


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_that_calls_itself_runs_again_as_a_whole(fails):
    torch.manual_seed(0)
    network = Recursive(fails)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
    guard = SafeStep(optimizer, network, action="monitor")
    before = copy.deepcopy(network).double()
    functional.cross_entropy(network(INPUTS), LABELS).backward()
    optimizer.step()

    after = dict(copy.deepcopy(network).double().named_parameters())
    params = dict(before.named_parameters())
    tangents = {name: (after[name] - params[name]).detach() for name in params}
    _, tangent = torch.func.jvp(
        lambda p: torch.func.functional_call(before, p, (INPUTS.double(),)), (params,), (tangents,)
    )
    assert guard.last.normalized_step == pytest.approx(spread(tangent.detach()), rel=1e-4)


def test_a_call_that_was_interrupted_does_not_hide_the_next():
    class Interrupted(nn.Linear):
        is_interrupted = False

        def forward(self, inputs):
            if self.is_interrupted:
                raise KeyboardInterrupt
            return super().forward(inputs)

    network = Interrupted(4, 5)
    guard = SafeStep(torch.optim.SGD(network.parameters(), lr=0.02), network)
    network.is_interrupted = True
    with pytest.raises(KeyboardInterrupt):
        network(INPUTS)
    network.is_interrupted = False

    functional.cross_entropy(network(INPUTS), LABELS).backward()
    guard.optimizer.step()

    assert guard.last.status == "ok"


@pytest.mark.parametrize("value", [-math.inf, -1e9])
@pytest.mark.parametrize("is_in_place", [False, True])
def test_actions_that_are_masked_after_the_model_do_not_count(is_in_place, value):
    def backward(network):
        logits = network(INPUTS)
        fill = logits.masked_fill_ if is_in_place else logits.masked_fill
        functional.cross_entropy(fill(FORBIDDEN, value), LABELS).backward()

    guard, tangent = compared(backward)

    assert spread(tangent, FORBIDDEN) < 0.99 * spread(tangent)
    assert guard.last.normalized_step == pytest.approx(spread(tangent, FORBIDDEN), rel=1e-4)


@pytest.mark.filterwarnings("ignore:SafeStep. output.*(taken for the logits|pushed away)")
@pytest.mark.parametrize("entropy", [0.0, 0.01])
def test_masked_actions_of_a_policy_gradient_do_not_count(entropy):
    advantage = torch.linspace(-1, 1, 8)

    def backward(network):
        log_p = network(INPUTS).masked_fill(FORBIDDEN, -1e9).log_softmax(-1)
        chosen = log_p.gather(-1, LABELS.unsqueeze(-1)).squeeze(-1)
        bonus = (log_p.exp() * log_p).sum(-1)
        (entropy * bonus - advantage * chosen).mean().backward()

    guard, tangent = compared(backward)

    assert guard.last.normalized_step == pytest.approx(spread(tangent, FORBIDDEN), rel=1e-4)


@pytest.mark.filterwarnings("ignore:SafeStep. output.1.. not measured")
@pytest.mark.filterwarnings("ignore:SafeStep. the model .Odd. has no forward-mode derivative")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("estimator", ["jvp", "auto"])
@pytest.mark.parametrize("kind", ["empty", "complex", "sparse", "nested"])
def test_an_output_of_another_kind_does_not_stop_training(kind, estimator):
    class Odd(nn.Linear):
        def forward(self, inputs):
            logits = super().forward(inputs)
            other = {
                "empty": lambda: logits[:0, :2],
                "complex": lambda: torch.complex(logits, logits),
                "sparse": lambda: logits.to_sparse(),
                "nested": lambda: torch.nested.as_nested_tensor([logits[:3], logits[3:]]),
            }[kind]()
            return logits, other

    torch.manual_seed(0)
    network = Odd(4, 5)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
    guard = SafeStep(optimizer, network, estimator=estimator)
    for _ in range(2):
        before = copy.deepcopy(network).double()
        optimizer.zero_grad()
        logits, other = network(INPUTS)
        extra = other.to_dense() if kind == "sparse" else other
        extra = extra.unbind()[0] if kind == "nested" else extra
        (functional.cross_entropy(logits, LABELS) + 0 * extra.abs().sum()).backward()
        optimizer.step()

    with torch.no_grad():
        x = INPUTS.double()
        tangent = nn.Linear.forward(network.double(), x) - nn.Linear.forward(before, x)
    assert guard.last.status == "ok"
    rel = 1e-2 if guard.last.estimator.startswith("difference") else 1e-4
    assert guard.last.normalized_step == pytest.approx(spread(tangent), rel=rel)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_where_no_row_has_a_gradient_all_rows_count_and_the_reason_says_so(reduction):
    """Adam goes on by momentum: a x1000 step would pass if nothing counted."""
    network = model()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    guard = SafeStep(optimizer, network)
    for step in range(5):
        labels = torch.full_like(LABELS, -100) if step == 4 else LABELS
        optimizer.param_groups[0]["lr"] = 10.0 if step == 4 else 1e-2
        before = copy.deepcopy(network).double()
        optimizer.zero_grad()
        functional.cross_entropy(network(INPUTS), labels, reduction=reduction).backward()
        optimizer.step()

    after = copy.deepcopy(network).double()
    with torch.no_grad():
        applied = spread(after(INPUTS.double()) - before(INPUTS.double()))
    assert guard.last.status == "clipped"
    assert applied == pytest.approx(1.0, rel=1e-4)  # float32
    assert "no row has a gradient" in guard.last.reason


@pytest.mark.filterwarnings("ignore:SafeStep")
def test_a_large_gradient_that_is_changed_in_place_is_not_read_as_it_became():
    torch.manual_seed(0)
    network, inputs, labels = nn.Linear(4, 700), torch.randn(100, 4), torch.randint(700, (100,))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    guard, reports = SafeStep(optimizer, network, estimator="jvp"), []
    for step in range(6):
        optimizer.zero_grad()
        output = network(inputs)
        functional.cross_entropy(output, labels).backward()
        if step > 1:
            (gradient,) = guard._recorder._calls[-1].kept.sums.values()
            gradient.add_(1.0)  # as a fused backward that works in place might
        optimizer.step()
        reports.append(guard.last)

    assert [report.status for report in reports] == ["ok", "ok", "unmeasured", "ok", "ok", "ok"]
    assert "was changed in place" in reports[2].reason
