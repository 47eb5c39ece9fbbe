"""One training under a rule, in a situation: what bench_peers.py repeats."""

from __future__ import annotations

import math
import statistics
from time import process_time
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from .rule import Rule
from .rules import RULES
from .situations import SITUATIONS, STEPS, Situation
from .task import Task


def train(task: Task, rule: str, situation: str, seed: int, rank: int = 0) -> list[Any]:
    """Train once and return what came out, in the order of COLUMNS."""
    return _train(task, RULES[rule], SITUATIONS[situation], seed, rank)


def _train(
    task: Task, rule_type: type[Rule], situation: Situation, seed: int, rank: int
) -> list[Any]:
    torch.manual_seed(seed)
    model = trained = task.model()
    if task.ranks > 1:
        trained = DistributedDataParallel(model)
        situation = situation if rank == task.ranks - 1 else situation.with_good_data()
    start, _ = task.evaluate(model)
    rule = rule_type(trained, task.lr, situation.betas)
    generator = torch.Generator().manual_seed(1000 + seed + 10_000 * rank)
    begin, losses = process_time(), _steps(task, trained, rule, situation, generator)
    seconds = process_time() - begin
    rule.before_evaluation()
    final, accuracy = task.evaluate(model)
    return [
        _short(final), _short(accuracy), rule.touched, round(seconds, 2),
        _short(_spike_score(losses)), len(losses), _short(start),
    ]  # fmt: skip


def _steps(
    task: Task, model: nn.Module, rule: Rule, situation: Situation, generator: torch.Generator
) -> list[float]:
    """Train and return the losses, fewer than STEPS where the rule ended the run."""
    rates = [group["lr"] for group in rule.optimizer.param_groups]
    losses = []
    for step in range(STEPS):
        factor = min(1.0, (step + 1) / situation.warm_up) * situation.rate(step)
        for group, rate in zip(rule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        try:
            losses.append(_step(task, model, rule, situation, step, generator))
        except RuntimeError as error:
            if "in a row" not in str(error):  # else the guard ended the run
                raise
            break
    return losses


def _step(
    task: Task, model: nn.Module, rule: Rule, situation: Situation, step: int,
    generator: torch.Generator,
) -> float:  # fmt: skip
    """Make one step of training and return the loss before it."""
    inputs, targets = situation.spoil(step, *task.batch(generator))

    def forward() -> torch.Tensor:
        with situation.context():
            logits = model(inputs)
        return situation.logits(step, logits.float())

    logits = forward()
    loss_of = task.loss(logits, targets, generator)
    loss = loss_of(logits)
    rule.optimizer.zero_grad()
    loss.backward()
    seen = _mean_over_ranks(loss)
    rule.step(seen, lambda: _mean_over_ranks(loss_of(forward())))
    return float(seen)


def _mean_over_ranks(loss: torch.Tensor) -> torch.Tensor:
    """Return the loss that all ranks decide on, a tensor of its own."""
    loss = loss.detach()
    if distributed.is_initialized():
        loss = loss / distributed.get_world_size()
        distributed.all_reduce(loss)
    return loss


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _spike_score(losses: list[float]) -> float:
    """Return the share of losses over the rolling mean of 64 by more than 7 standard deviations."""
    spikes = 0
    for index in range(32, len(losses)):
        before = [x for x in losses[max(0, index - 64) : index] if math.isfinite(x)]
        limit = statistics.mean(before) + 7 * statistics.stdev(before) if len(before) > 1 else 0.0
        spikes += not losses[index] <= limit
    return spikes / max(1, len(losses) - 32)
