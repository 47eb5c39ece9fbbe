"""SafeStep where two ranks hold a stage of a pipeline each: ``pipeline_stages.py OUTPUT``."""

import sys

import torch
import torch.distributed as dist
from launch import run
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from safestep import SafeStep


def main(rank, output):
    groups = [dist.new_group([0]), dist.new_group([1])]
    found = {
        "unguarded": train(rank, is_guarded=False),
        "both": train(rank),
        "both, of one shape": train(rank, is_wide=False),
        "last": train(rank, is_guarded=rank == 1, process_group=groups[rank]),
        "each": train(rank, process_group=groups[rank], action="monitor"),
    }
    torch.save(found, f"{output}/rank{rank}.pt")


def stage_of(rank, is_wide):
    torch.manual_seed(0)
    width = 8 if is_wide else 6
    stages = [
        nn.Sequential(nn.Linear(6, width), nn.Tanh()), nn.Sequential(nn.Linear(width, 6), nn.Tanh())
    ]  # fmt: skip
    return stages[rank]


def train(rank, *, is_guarded=True, is_wide=True, **options):
    """Take four steps of two micro-batches; return reports or an error, and the parameters."""
    module = stage_of(rank, is_wide)
    schedule = Schedule1F1B(
        PipelineStage(module, rank, 2, torch.device("cpu")),
        n_microbatches=2,
        loss_fn=nn.functional.cross_entropy,
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    guard = SafeStep(optimizer, module, **options) if is_guarded else None
    generator = torch.Generator().manual_seed(0)
    start = [param.detach().clone() for param in module.parameters()]
    error, reports, steps = None, [], []
    for _ in range(4):
        inputs = torch.randn(8, 6, generator=generator)
        optimizer.zero_grad()
        schedule.step(inputs) if rank == 0 else schedule.step(target=torch.arange(8) % 6)
        before = [param.detach().clone() for param in module.parameters()]
        try:
            optimizer.step()
        except ValueError as raised:
            error = str(raised)
            break
        reports.append((guard.last.status, guard.last.reason) if guard else None)
        moved = [param.detach().clone() for param in module.parameters()]
        steps.append((before, moved, inputs, guard.last.normalized_step if guard else None))
    after = [param.detach().clone() for param in module.parameters()]
    return {
        "error": error, "reports": reports, "start": start, "after": after, "steps": steps,
    }  # fmt: skip


if __name__ == "__main__":
    run(main, 2, sys.argv[1])
