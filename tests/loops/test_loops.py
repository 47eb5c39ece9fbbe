"""Training loops as people write them: unharmed, measured against float64, and saved from a spike.

``pytest -m loops``. Each entry of LOOPS is a loop, each of OPTIMIZERS an optimizer in a plain one.
"""

import copy
import math

import pytest
import torch
from loops.loop import Loop, draw, network
from loops.optimizers import OPTIMIZERS
from loops.published import PUBLISHED
from loops.techniques import TECHNIQUES
from torch import nn, optim
from torch.func import functional_call
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss, softmax
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

pytestmark = [
    pytest.mark.loops,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
STEPS, LIMIT = 12, 0.3


class RaggedAccumulation(Loop):
    def backward(self, seed):
        batches = [draw(10 * seed + length, 2, length) for length in (3, 7, 1, 5)]
        count = sum(targets.numel() for _, targets in batches)
        for inputs, targets in batches:
            logits = self.model(inputs).flatten(0, 1)
            (cross_entropy(logits, targets.flatten(), reduction="sum") / count).backward()
        return [(inputs,) for inputs, _ in batches]


class Checkpointed(nn.Module):
    def __init__(self, is_reentrant):
        super().__init__()
        self.body, self.head = network()[:3], nn.Linear(12, 3)
        self.is_reentrant = is_reentrant

    def forward(self, inputs):
        if not (self.training and torch.is_grad_enabled()):
            return self.head(self.body(inputs))
        inputs = inputs.requires_grad_() if self.is_reentrant else inputs
        return self.head(checkpoint(self.body, inputs, use_reentrant=self.is_reentrant))


class CheckpointingReentrant(Loop):
    def build(self):
        return Checkpointed(True)


class Checkpointing(Loop):
    def build(self):
        return Checkpointed(False)


class CompiledStep(Loop):
    def backward(self, seed):
        if not hasattr(self, "step"):
            self.step = torch.compile(
                lambda x, y: cross_entropy(self.model(x), y), backend="aot_eager"
            )
        inputs, targets = draw(seed)
        for guard in self.guards:
            guard.record(self.step, inputs, targets)
        self.step(inputs, targets).backward()
        return [(inputs,)]


class ExponentialAverage(Loop):
    def __init__(self, make=optim.AdamW):
        super().__init__(make)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def after_step(self):
        self.average.update_parameters(self.model)


class Dropping(nn.Module):
    """Dropout whose mask is an argument, so that the reference can use the same."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, inputs, mask):
        return self.net(inputs * mask)


class RDrop(Loop):
    def build(self):
        return Dropping()

    def backward(self, seed):
        inputs, targets = draw(seed)
        masks = [(draw(seed + 100 * i)[0] > -0.8).float() * 1.25 for i in (1, 2)]
        one, other = (self.model(inputs, mask) for mask in masks)
        loss = cross_entropy(one, targets) + cross_entropy(other, targets)
        logs = log_softmax(one, -1), log_softmax(other, -1)
        for log, target in (logs, logs[::-1]):
            loss = loss + kl_div(log, target, log_target=True, reduction="batchmean")
        loss.backward()
        return [(inputs, mask) for mask in masks]


class GradientPenalty(Loop):
    def backward(self, seed):
        inputs, targets = draw(seed)
        inputs.requires_grad_()
        loss = cross_entropy(self.model(inputs), targets)
        (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
        (loss + 0.1 * slope.square().sum()).backward()
        return [(inputs.detach(),)]


class MeanTeacher(Loop):
    def __init__(self, make=optim.AdamW):
        super().__init__(make)
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)

    def backward(self, seed):
        inputs, targets = draw(seed)
        noisy = inputs + 0.1 * draw(seed + 500)[0]
        logits = self.model(noisy)
        with torch.no_grad():
            wanted = softmax(self.teacher(inputs), -1)
        (cross_entropy(logits, targets) + mse_loss(softmax(logits, -1), wanted)).backward()
        return [(noisy,)]

    @torch.no_grad()
    def after_step(self):
        for slow, param in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            slow.lerp_(param, 0.1)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = network()[:3]
        self.heads = nn.ModuleList([nn.Linear(12, 3), nn.Linear(12, 3)])

    def forward(self, inputs):
        features = self.body(inputs)
        return [head(features) for head in self.heads]


class PCGrad(Loop):
    """Gradients of two tasks, each without what opposes the other."""

    def build(self):
        return TwoHeads()

    def backward(self, seed):
        inputs, targets = draw(seed)
        params = list(self.model.parameters())
        losses = [
            cross_entropy(logits, each)
            for logits, each in zip(self.model(inputs), (targets, targets.flip(0)), strict=True)
        ]
        one, other = (
            torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True)
            for loss in losses
        )
        dot = sum(float((a * b).sum()) for a, b in zip(one, other, strict=True))
        sizes = [sum(float(g.square().sum()) for g in grads) for grads in (one, other)]
        share = min(dot, 0.0)
        for param, a, b in zip(params, one, other, strict=True):
            param.grad = a - share / sizes[1] * b + b - share / sizes[0] * a
        return [(inputs,)]


class TwoOptimizers(Loop):
    def make_optimizers(self, make):
        body, head = self.model[:3].parameters(), self.model[3:].parameters()
        return [make(body, lr=self.lr), optim.SGD(head, lr=self.lr)]


class SumOfLosses(Loop):
    """Two backward passes through calls of their own, as of labelled and unlabelled batches."""

    def backward(self, seed):
        calls = []
        for offset in (0, 1000):
            inputs, targets = draw(seed + offset)
            cross_entropy(self.model(inputs), targets).backward()
            calls.append((inputs,))
        return calls


class ClippedGradients(Loop):
    def backward(self, seed):
        calls = super().backward(seed)
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        return calls


class MetaLearning(Loop):
    """The loss after a step of an inner loop on parameters that stand in for the model's."""

    def adapted(self, model, inputs, targets, others):
        params = dict(model.named_parameters())
        loss = cross_entropy(functional_call(model, params, (inputs,)), targets)
        slopes = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        moved = {k: v - 0.4 * g for (k, v), g in zip(params.items(), slopes, strict=True)}
        return functional_call(model, moved, (others,))

    def loss(self, inputs, targets):
        logits = self.adapted(self.model, inputs[:4], targets[:4], inputs[4:])
        return cross_entropy(logits, targets[4:])

    def backward(self, seed):
        inputs, targets = draw(seed)
        for guard in self.guards:
            guard.record(self.loss, inputs, targets)
        self.loss(inputs, targets).backward()
        return [(inputs, targets)]

    def logits(self, model, inputs, targets):
        with torch.enable_grad():
            return self.adapted(model, inputs[:4], targets[:4], inputs[4:]).detach()


class TruncatedBackpropagation(Loop):
    """A recurrent network whose hidden state is carried on without its graph."""

    def __init__(self, make=optim.AdamW):
        super().__init__(make)
        self.hidden = torch.zeros(1, 8, 12)

    def build(self):
        return Recurrent()

    def backward(self, seed):
        inputs, targets = draw(seed, 4, 8)
        self.hidden = hidden = self.hidden.detach()
        logits, self.hidden = self.model(inputs, hidden)
        cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        return [(inputs, hidden)]

    def logits(self, model, *args):
        return model(*args)[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.GRU(5, 12), nn.Linear(12, 3)

    def forward(self, inputs, hidden):
        outputs, hidden = self.cell(inputs, hidden)
        return self.head(outputs), hidden


class Adversarial(Loop):
    """Trained where a step uphill along the input leads, whose gradients are cleared."""

    def backward(self, seed):
        inputs, targets = draw(seed)
        probe = inputs.clone().requires_grad_()
        cross_entropy(self.model(probe), targets).backward()
        self.model.zero_grad()
        worse = inputs + 0.1 * probe.grad.sign()
        cross_entropy(self.model(worse), targets).backward()
        return [(worse,)]


class Lora(Loop):
    use_dora = False

    def build(self):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(
            target_modules=["0", "3"], r=2, lora_dropout=0.0, use_dora=self.use_dora
        )
        return peft.get_peft_model(network(), config)


class Dora(Lora):
    use_dora = True
    tolerance = 0.05  # the norm that DoRA detaches is missing in r where it makes little difference


LOOPS = {
    "plain": Loop,
    "ragged accumulation": RaggedAccumulation,
    "checkpointing, reentrant": CheckpointingReentrant,
    "checkpointing": Checkpointing,
    "compiled step": CompiledStep,
    "exponential average": ExponentialAverage,
    "R-Drop": RDrop,
    "gradient penalty": GradientPenalty,
    "mean teacher": MeanTeacher,
    "PCGrad": PCGrad,
    "two optimizers": TwoOptimizers,
    "two backward passes": SumOfLosses,
    "clipped gradients": ClippedGradients,
    "meta-learning": MetaLearning,
    "truncated backpropagation": TruncatedBackpropagation,
    "adversarial training": Adversarial,
    "PEFT LoRA": Lora,
    "PEFT DoRA": Dora,
    **PUBLISHED,
    **TECHNIQUES,
}
COMBINED = r".*sums over combinations of classes"
# What the guard says of a loop, and is right to.
SAID = {
    "conditional random field": COMBINED,
    "CTC": COMBINED,
    "PEFT DoRA": "two estimators of one step differ",  # DoRA detaches a norm
}
CASES = [
    *(
        pytest.param(
            loop,
            optim.AdamW,
            id=name,
            marks=pytest.mark.filterwarnings(f"ignore:SafeStep. {SAID.get(name, 'nothing')}"),
        )
        for name, loop in LOOPS.items()
    ),
    *(pytest.param(Loop, make, id=name) for name, make in OPTIMIZERS.items()),
]


@pytest.mark.parametrize("name", ["conditional random field", "CTC"])
def test_what_is_measured_one_row_at_a_time_is_said(name):
    loop = LOOPS[name]()
    loop.guard()
    with pytest.warns(UserWarning, match=COMBINED):
        loop.train(0)


@pytest.mark.filterwarnings("ignore:SafeStep. a step was not measured")
def test_a_mixture_whose_weights_alone_are_an_output_is_not_measured_by_them():
    loop = LOOPS["mixture density"]()
    loop.is_told = False
    loop.guard()
    for seed in range(3):
        loop.train(seed)
        assert loop.guards[0].last.status == "unmeasured"
        assert "guard.record" in loop.guards[0].last.reason


def reference(loop, before, after, calls):
    """Return r in float64: the largest spread of the central difference of the logits over pi."""
    probe = copy.deepcopy(before).double()
    params = list(probe.parameters())
    starts = [param.detach().clone() for param in params]
    moves = [
        end.detach().double() - start for end, start in zip(after.parameters(), starts, strict=True)
    ]

    @torch.no_grad()
    def logits(share, args):
        for param, start, move in zip(params, starts, moves, strict=True):
            param.copy_(start + share * move)
        args = [arg.double() if arg.is_floating_point() else arg for arg in args]
        found = loop.logits(probe, *args)
        return found if isinstance(found, list) else [found]

    size = math.sqrt(sum(float(move.square().sum()) for move in moves))
    share, largest = 1e-5 / max(size, 1e-12), 0.0
    for args in calls:
        for up, down in zip(logits(share, args), logits(-share, args), strict=True):
            tangent = (up - down) / (2 * share)
            largest = max(largest, float((tangent.amax(-1) - tangent.amin(-1)).max()))
    return largest / math.pi


def bits(loop):
    return [param.detach().clone() for param in loop.model.parameters()]


@pytest.mark.parametrize("estimator", ["auto", "jvp"])
@pytest.mark.parametrize(("loop", "make"), CASES)
def test_training_is_bitwise_that_of_an_unguarded_twin(loop, make, estimator):
    plain, guarded = loop(make), loop(make)
    guarded.guard(estimator=estimator)
    for seed in range(STEPS):
        for each in (plain, guarded):
            torch.manual_seed(seed)
            each.train(seed)
        assert {guard.last.status for guard in guarded.guards} == {"ok"}

    torch.testing.assert_close(bits(guarded), bits(plain), rtol=0, atol=0)


@pytest.mark.parametrize(("loop", "make"), CASES)
def test_r_is_that_of_float64(loop, make):
    loop = loop(make)
    loop.guard(estimator="jvp")
    for seed in range(6):
        steps = loop.train(seed)
        for guard, step in zip(loop.guards, steps, strict=True):
            expected = reference(loop, *step)
            assert guard.last.status == "ok"
            assert guard.last.normalized_step == pytest.approx(
                expected, rel=loop.tolerance, abs=1e-6
            )


@pytest.mark.parametrize(("loop", "make"), CASES)
def test_a_spike_is_clipped_to_the_limit(loop, make):
    loop = loop(make)
    loop.guard(max_normalized_step=LIMIT)
    for seed in range(4):
        loop.train(seed)
    groups = [group for optimizer in loop.optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] *= 1e6

    steps = loop.train(4)

    for guard, step in zip(loop.guards, steps, strict=True):
        applied = reference(loop, *step)
        assert guard.last.status == ("clipped" if guard.last.normalized_step > LIMIT else "ok")
        assert applied <= LIMIT * (1 + loop.tolerance)
        if guard.last.status == "clipped":
            assert applied == pytest.approx(LIMIT, rel=loop.tolerance)
    assert any(guard.last.status == "clipped" for guard in loop.guards)
    for group in groups:
        group["lr"] /= 1e6
    loop.train(5)
    assert {guard.last.status for guard in loop.guards} <= {"ok", "clipped"}
