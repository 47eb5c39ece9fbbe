"""WorkerMetrics on fully_shard beside plain copies: ``sharded_workers.py OUTPUT NUM_RANKS``."""

import copy
import dataclasses
import sys

import torch
import torch.distributed as dist
from launch import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from safestep.workers.metrics import WorkerMetrics

STEPS = 4


def network():
    """Return a classifier with a sharded block of its own, of sizes that do not divide."""
    block = nn.Sequential(nn.Linear(7, 7), nn.LayerNorm(7), nn.GELU())
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), block, nn.Linear(7, 5, bias=False))


def main(rank, output):
    half = MixedPrecisionPolicy(reduce_dtype=torch.float16)
    found = {
        "plain": train(rank),
        "unwatched": train(rank, is_watched=False)["after"],
        "accumulated": train(rank, num_batches=3),
        "each reduced": train(rank, num_batches=3, is_each_reduced=True),
        "float16 reduction": train(rank, mp_policy=half),
        "every second": train(rank, every=2),
        "scaled": train(rank, scale=64.0),
        "refused": refused(),
    }
    torch.save(found, f"{output}/rank{rank}.pt")


class Scaler:
    def __init__(self, scale):
        self.scale = scale

    def get_scale(self):
        return self.scale


def train(
    rank, *, num_batches=1, is_watched=True, every=1, scale=1.0, is_each_reduced=False,
    **sharding,
):  # fmt: skip
    torch.manual_seed(0)
    model = network()
    reference = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[2], mesh=mesh, **sharding)
    fully_shard(model, mesh=mesh, **sharding)
    metrics = WorkerMetrics(model, every=every, scaler=Scaler(scale)) if is_watched else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 / scale)
    generator = torch.Generator().manual_seed(rank)
    reports, references = [], []
    for step in range(STEPS):
        batches = torch.randn(8 * num_batches, 6, generator=generator).split(8)
        state = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
        reference.load_state_dict(state)
        reference.zero_grad()
        optimizer.zero_grad()
        total, micro = 0.0, []
        for index, batch in enumerate(batches):
            is_last = index == num_batches - 1
            model.set_requires_gradient_sync(is_last or is_each_reduced)
            gradient = torch.autograd.grad(loss_of(reference, batch), list(reference.parameters()))
            norm = torch.cat([each.flatten() for each in gradient]).double().norm()
            loss = loss_of(reference, batch)
            (loss / num_batches).backward()
            total += loss.item() / num_batches
            micro.append([loss.item(), norm.item()])
            loss = loss_of(model, batch)
            (scale * loss / num_batches).backward()
            if metrics is not None:
                report = metrics.record(loss, is_last=is_last if is_each_reduced else None)
        if metrics is not None:
            reports.append(dataclasses.asdict(report) if report else None)
        whole = gathered(torch.tensor([total]).double()), gathered(flat(reference))
        references.append((*whole, gathered(torch.tensor(micro).double())))
        optimizer.step()
        if step == STEPS - 2 and metrics is not None:
            metrics.detach()
            metrics = None
    after = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
    return {"reports": reports, "references": references, "after": after}


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch), torch.arange(8) % 5)


def flat(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def gathered(mine):
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone)


def refused():
    """Return the messages where a worker's own gradient is nowhere whole."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("replicate", "shard"))
    tensor = parallelize_module(
        nn.Sequential(nn.Linear(8, 8)), mesh["shard"], {"0": ColwiseParallel()}
    )
    return {
        "hybrid": refusal(fully_shard(network(), mesh=mesh)),
        "tensor": refusal(tensor),
    }


def refusal(model):
    try:
        WorkerMetrics(model)
    except ValueError as error:
        return str(error)


if __name__ == "__main__":
    run(main, int(sys.argv[2]), sys.argv[1])
