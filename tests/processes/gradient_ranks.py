"""Faults in a gradient, on some ranks of DDP or on all: ``gradient_ranks.py OUTPUT NUM_RANKS``."""

import json
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from launch import run
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from safestep import SafeStep
from safestep.workers.metrics import WorkerMetrics

FAULTY_FROM, STEPS = 9, 13


def network():
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 5))


class Unrepeatable(nn.Module):
    """Within a step its forward pass runs on one rank only without a graph."""

    is_in_step = False

    def forward(self, x):
        if self.is_in_step and torch.is_grad_enabled() and dist.get_rank() == 1:
            raise MemoryError("no room for a second backward pass")
        return x


class Fault:
    """A change of the gradients within the backward pass, on one rank and from one step on."""

    def __init__(self, kind, model, ranks):
        self.kind, self.step, self.last = kind, 0, {}
        if dist.get_rank() in ranks:
            for param in model.parameters():
                param.register_hook(lambda gradient, param=param: self.changed(gradient, param))

    def changed(self, gradient, param):
        before, self.last[param] = self.last.get(param), gradient
        if self.step < FAULTY_FROM:
            return gradient
        if self.kind == "stale":
            return before if param.shape == (16, 6) else gradient
        return gradient * {"scaled": 1.05, "sign": -1.0}.get(self.kind, 1.0)


def train(
    output, name, *, fault=None, ranks=(), after=None, metrics=None, batches=1, steps=STEPS,
    penalty=0, recovers=False, autocast=False, unrepeatable=False, enabled=True, **options,
):  # fmt: skip
    """Train with a guard and return what it told."""
    torch.manual_seed(0)
    ddp = DistributedDataParallel(network().extend([Unrepeatable()] if unrepeatable else []))
    planted = Fault(fault, ddp.module, ranks)
    torch.manual_seed(100 + dist.get_rank())
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3)
    watch = None if metrics is None else WorkerMetrics(ddp, **metrics)
    options = {"audit_interval": 1, **options}
    guard = SafeStep(optimizer, ddp, run_dir=Path(output, name.replace(" ", "_")), **options)
    guard.enabled = enabled
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        ratios = []
        for step in range(steps):
            planted.step = -1 if recovers and step >= FAULTY_FROM + 3 else step
            optimizer.zero_grad()
            for batch in range(batches):
                is_last = batch == batches - 1
                with nullcontext() if is_last else ddp.no_sync():
                    inputs, labels = torch.randn(16, 6), torch.randint(5, (16,))
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        logits = ddp(inputs)
                    loss = functional.cross_entropy(logits.float(), labels)
                    whole = loss + penalty * sum(p.square().sum() for p in ddp.parameters())
                    (whole / batches).backward()
                    if watch is not None:
                        watch.record(loss)
            if after is not None and step >= FAULTY_FROM:
                after(ddp.module)
            Unrepeatable.is_in_step = True  # an attribute of the guarded module would be put back
            optimizer.step()
            Unrepeatable.is_in_step = False
            ratios.append(guard.last.gradient_ratio if enabled else None)
    guard.detach()
    if watch is not None:
        watch.detach()
    weights = torch.cat([param.detach().flatten() for param in ddp.parameters()])
    told = [str(each.message) for each in warned if "SafeStep" in str(each.message)]
    return {"ratios": ratios, "warned": told, "weights": weights.tolist()}


def scaled(model):
    for param in model.parameters():
        param.grad.mul_(1.05)


def layer(model):
    model[0].weight.grad.mul_(1.3)


def clipped(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def main(rank, output):
    last, kept = dist.get_world_size() - 1, {"pairwise_every": 1}
    faulty = {"metrics": kept, "ranks": (last,)}
    scenarios = {
        "clean": {"metrics": kept, "steps": 40},
        "clean without": {"steps": 40},
        "clean half": {"metrics": kept, "steps": 40, "autocast": True},
        "scaled": {"fault": "scaled", **faulty, "recovers": True},
        "stale": {"fault": "stale", **faulty},
        "sign": {"fault": "sign", **faulty},
        "accumulated": {"fault": "scaled", **faulty, "batches": 2},
        "half": {"fault": "sign", **faulty, "autocast": True},
        "not asked": {"fault": "sign", **faulty, "estimator": "jvp", "audit_interval": None},
        "all": {"fault": "scaled", "ranks": range(last + 1), "metrics": kept},
        "seldom": {"fault": "sign", "ranks": (last,), "metrics": {"every": 50}},
        "penalty": {"penalty": 0.1, "metrics": kept},
        "after scaled": {"after": scaled, "metrics": kept},
        "after layer": {"after": layer},
        "plain": {"after": layer, "enabled": False},
        "unrepeatable": {"after": layer, "unrepeatable": True},
        "clipped": {"after": clipped, "metrics": kept},
    }
    found = {name: train(output, name, **options) for name, options in scenarios.items()}
    Path(output, f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run(main, int(sys.argv[2]), sys.argv[1])
