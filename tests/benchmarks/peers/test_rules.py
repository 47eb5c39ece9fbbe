"""Each rule of a few lines does on a toy what its paper says."""

import math

import pytest
import torch
from benchmarks.peers.gradient_rules import AGC, AdaGC, Clip, SkipStep, ZClip
from benchmarks.peers.guarded_rules import Guarded
from benchmarks.peers.rule import Rule
from benchmarks.peers.update_rules import LineSearch, UpdateRMS
from helpers.compare import assert_bitwise_equal
from torch import nn


def rule_of(kind, lr=1e-2, betas=(0.9, 0.999)):
    torch.manual_seed(0)
    return kind(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), lr, betas)


def give(rule, norms):
    """Give each parameter a gradient of its norm, and return copies of the gradients."""
    generator = torch.Generator().manual_seed(0)
    for param, norm in zip(rule.model.parameters(), norms, strict=True):
        grad = torch.randn(param.shape, generator=generator)
        param.grad = grad * norm / grad.norm()
    return [grad.clone() for grad in rule.gradients()]


def total(grads):
    return float(torch.cat([grad.flatten() for grad in grads]).norm())


def test_clip_shortens_the_joint_gradient_to_one_and_keeps_its_direction():
    rule = rule_of(Clip)
    before = give(rule, [3.0, 4.0, 0.0, 0.0])

    rule.allows(torch.tensor(1.0))

    for grad, start in zip(rule.gradients(), before, strict=True):
        torch.testing.assert_close(grad, start / 5, rtol=1e-5, atol=0)
    give(rule, [0.3, 0.4, 0.0, 0.0])
    rule.allows(torch.tensor(1.0))
    assert rule.touched == 1


def test_zclip_clips_an_outlier_to_the_reciprocal_of_its_score():
    rule = rule_of(ZClip)
    for step in range(25):
        give(rule, [0.9 if step % 2 else 1.1, 0.0, 0.0, 0.0])
        rule.allows(torch.tensor(1.0))
    mean, sigma = rule.mean, math.sqrt(rule.variance)
    give(rule, [mean + 2.4 * sigma, 0.0, 0.0, 0.0])
    rule.allows(torch.tensor(1.0))
    assert rule.touched == 0
    mean, sigma = rule.mean, math.sqrt(rule.variance)
    give(rule, [mean + 10 * sigma, 0.0, 0.0, 0.0])

    rule.allows(torch.tensor(1.0))

    assert rule.touched == 1
    assert total(rule.gradients()) == pytest.approx(mean + 0.625 * sigma, rel=1e-5)  # 2.5^2 / 10


def test_adagc_clips_each_tensor_by_its_own_past():
    rule = rule_of(AdaGC)
    for norm in (0.2, *[0.3] * (rule.warm_up - 1)):
        give(rule, [norm] * 4)
        rule.allows(torch.tensor(1.0))
    before = give(rule, [5.0, 0.1, 0.1, 0.1])

    rule.allows(torch.tensor(1.0))

    first, *others = rule.gradients()
    assert float(first.norm()) == pytest.approx(1.05 * 0.2, rel=1e-5)  # of the smallest
    assert all(map(torch.equal, others, before[1:]))
    assert float(rule.norms[0]) == pytest.approx(0.98 * 0.2 + 0.02 * 1.05 * 0.2, rel=1e-5)


def test_agc_bounds_each_unit_by_its_weights():
    rule = rule_of(AGC)
    before = give(rule, [1.0, 1.0, 1e-4, 1.0])

    rule.allows(torch.tensor(1.0))

    for param, start in zip(rule.model.parameters(), before, strict=True):
        if param.ndim == 1:
            assert torch.equal(param.grad, start)
            continue
        for row, grad, was in zip(param.detach(), param.grad, start, strict=True):
            bound = 0.01 * float(row.norm())
            assert float(grad.norm()) == pytest.approx(min(float(was.norm()), bound), rel=1e-5)


def test_agc_takes_the_filters_of_a_convolution_as_its_units():
    torch.manual_seed(0)
    rule = AGC(nn.Conv2d(2, 3, 3), 1e-2, (0.9, 0.999))
    give(rule, [5.0, 1.0])

    rule.allows(torch.tensor(1.0))

    weight = rule.model.weight
    for unit, grad in zip(weight.detach(), weight.grad, strict=True):
        assert float(grad.norm()) == pytest.approx(0.01 * float(unit.norm()), rel=1e-5)


def test_agc_is_that_of_the_package():
    package = pytest.importorskip("pytorch_optimizer.optimizer.agc")
    rule = rule_of(AGC)
    before = give(rule, [1.0, 1.0, 1e-4, 1.0])

    rule.allows(torch.tensor(1.0))

    for param, start in zip(rule.model.parameters(), before, strict=True):
        if param.ndim > 1:
            torch.testing.assert_close(param.grad, package.agc(param.detach(), start))


def test_the_update_of_a_tensor_has_at_most_the_learning_rate_as_its_rms():
    betas = (0.5, 0.999)  # v is slow to see that gradients grow
    rule, plain = rule_of(UpdateRMS, betas=betas), rule_of(Rule, betas=betas)
    for norm in (*[1e-3] * 20, 1.0):
        before = [p.detach().clone() for p in rule.model.parameters()]
        plain.model.load_state_dict(rule.model.state_dict())
        for each in (rule, plain):
            give(each, [norm] * 4)
            each.step(torch.tensor(1.0), lambda: torch.tensor(1.0))

    assert rule.touched >= 1
    params = zip(rule.model.parameters(), plain.model.parameters(), before, strict=True)
    for param, free, start in params:
        moved, would = param.detach() - start, free.detach() - start
        assert float(would.square().mean().sqrt()) > 0.02
        assert float(moved.square().mean().sqrt()) == pytest.approx(0.01, rel=1e-3)
        assert float(torch.cosine_similarity(moved.flatten(), would.flatten(), 0)) > 0.9999


@pytest.mark.parametrize("loss", [2.0, math.nan])
def test_an_outlier_of_the_loss_is_not_stepped_on(loss):
    rule = rule_of(SkipStep)
    for step in range(64):
        give(rule, [0.1] * 4)
        rule.step(torch.tensor(1.0 + 0.01 * (step % 2)), None)
    kept = [p.detach().clone() for p in rule.model.parameters()]
    give(rule, [0.1] * 4)

    rule.step(torch.tensor(loss), None)

    assert rule.touched == 1
    assert all(map(torch.equal, kept, rule.model.parameters()))


@pytest.mark.parametrize("factor", [1.0, 1e4])
def test_the_line_search_takes_the_first_rate_that_falls_enough(factor):
    """Along sign(g) of a quadratic the loss at rate s is known: f - s |g|_1 + s^2 sum(h) / 2."""
    rule = rule_of(LineSearch)
    curvature = 30.0

    def closure():
        return sum(curvature / 2 * p.square().sum() for p in rule.model.parameters())

    loss = closure()
    loss.backward()
    slope = float(sum(p.grad.abs().sum() for p in rule.model.parameters()))
    total = curvature * sum(p.numel() for p in rule.model.parameters())
    largest = 2 * (1 - rule.c) * slope / total  # of those that satisfy Armijo's condition
    rule.optimizer.param_groups[0]["lr"] = factor

    rule.step(loss.detach(), closure)

    assert largest / 2 < rule.rate <= largest * (1 + 1e-5)
    assert float(closure().detach()) < float(loss.detach())


def test_a_guard_that_does_nothing_counts_nothing():
    rule = rule_of(Guarded, lr=1e-5)
    plain = rule_of(Clip, lr=1e-5)
    for each in (rule, plain):
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        loss = nn.functional.cross_entropy(each.model(inputs), torch.tensor([0, 1, 0, 1]))
        loss.backward()
        each.step(loss.detach(), None)

    assert rule.touched == 0
    assert_bitwise_equal(rule.model.state_dict(), plain.model.state_dict())
