"""Losses that an autograd.Function of another package computes without forming the logits."""

import copy
import math

import pytest
import torch
from torch import nn

from safestep import SafeStep
from safestep.capture.autograd_functions import visible_functions


class ChunkedLogProbFunction(torch.autograd.Function):
    """The interface of TRL's class, computed in the plainest way."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, temperature, chunk, softcap=None, scale=1.0, outputs=()
    ):
        with torch.enable_grad():
            leaves = [leaf.detach().requires_grad_() for leaf in (hidden, weight)]
            logits = leaves[0] @ leaves[1].T * scale / temperature
            result = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        ctx.leaves, ctx.result = leaves, result
        return result.detach(), None

    @staticmethod
    def backward(ctx, gradient, _):
        hidden, weight = torch.autograd.grad(ctx.result, ctx.leaves, gradient)
        return hidden, weight, None, None, None, None, None, None, None


ChunkedLogProbFunction.__module__ = "trl.kernels.chunked_logprob"
TARGETS = torch.tensor([0, 2, 1, 4, 3, 0, 1, 2])
KEPT = torch.tensor([True, True, False, True, True, False, True, True])


class Policy(nn.Module):
    """Returns log-probabilities of the targets alone."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 6), nn.Tanh())
        self.head = nn.Linear(6, 5, bias=False)

    def forward(self, inputs):
        found, _ = ChunkedLogProbFunction.apply(
            self.body(inputs), self.head.weight, None, TARGETS, 0.7, 256, None, 2.0
        )
        return {"loss": -found.masked_fill(~KEPT, 0.0).mean()}


@pytest.mark.parametrize("told", [False, True], ids=["forward pass", "told"])
def test_r_of_a_fused_projection_is_that_of_its_logits(told):
    torch.manual_seed(0)
    inputs, model = torch.randn(8, 3), Policy()
    plain, start = copy.deepcopy(model), copy.deepcopy(model).double()
    guard = SafeStep(torch.optim.SGD(model.parameters(), lr=0.5), model)

    if told:
        guard.record(lambda: model(inputs)["loss"])
    model(inputs)["loss"].backward()
    guard.optimizer.step()
    plain(inputs)["loss"].backward()
    torch.optim.SGD(plain.parameters(), lr=0.5).step()

    params = dict(start.named_parameters())
    update = {n: p.detach().double() - params[n].detach() for n, p in model.named_parameters()}

    def logits(body, bias, head):
        return 2.0 / 0.7 * (torch.tanh(inputs.double() @ body.T + bias) @ head.T)

    names = ["body.0.weight", "body.0.bias", "head.weight"]
    _, tangent = torch.func.jvp(
        logits,
        tuple(params[name].detach() for name in names),
        tuple(update[name] for name in names),
    )
    spread = (tangent.amax(-1) - tangent.amin(-1))[KEPT].max()
    assert (guard.last.status, guard.last.estimator) == ("ok", "jvp")
    assert guard.last.normalized_step == pytest.approx(float(spread) / math.pi, rel=1e-5)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_logits_that_are_capped_inside_are_not_measured_and_the_reason_says_so():
    model = nn.Linear(3, 5, bias=False)
    guard = SafeStep(torch.optim.SGD(model.parameters(), lr=0.5), model)

    def loss():
        found, _ = ChunkedLogProbFunction.apply(
            torch.eye(8, 3), model.weight, None, TARGETS, 1.0, 256, 30.0
        )
        return -found.mean()

    guard.record(loss)
    loss().backward()
    with pytest.warns(UserWarning, match="final_logit_softcapping"):
        guard.optimizer.step()

    assert guard.last.status == "unmeasured"
    assert "capped inside a fused function" in guard.last.reason


def test_a_class_is_as_it_was_after_a_re_run():
    with visible_functions():
        assert "apply" in vars(ChunkedLogProbFunction)

    assert "apply" not in vars(ChunkedLogProbFunction)
