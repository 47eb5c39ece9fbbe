"""How often does a run of equal replicas raise an alarm? ``replica_alarms.py [STEPS]``, two ranks.

Prints a table row for each setting: its steps, and the events about replicas of the guard (update
norms at every step, checksums of parameters and optimizer state at every 50th) and of
WorkerMetrics. The last setting moves one layer of one replica by 0.01 % halfway: it must be seen.
"""

import contextlib
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "processes"))

import torch
import torch.distributed as dist
from launch import run
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from safestep import SafeStep, read_run
from safestep.workers import WorkerMetrics

SETTINGS = {
    "plain": {},
    "fp16 compression": {"hook": "fp16"},
    "PowerSGD": {"hook": "power"},
    "accumulation": {"num_batches": 3},
    "static graph": {"static_graph": True},
    "bfloat16 autocast": {"is_half": True},
    "bfloat16 parameters": {"dtype": torch.bfloat16},
    "clipped gradients": {"is_clipped": True},
    "one layer moved by 0.01 %": {"is_moved": True},
}


def main(rank, steps, output):
    if rank == 0:
        print("| setting | steps | events |\n|---|---|---|", flush=True)
    for name, options in SETTINGS.items():
        found = count(rank, name, steps, output, **options)
        if rank == 0:
            print(f"| {name} | {steps:,} | {found} |", flush=True)


def count(
    rank, name, steps, output, *, hook=None, num_batches=1, is_half=False, dtype=torch.float32,
    is_clipped=False, is_moved=False, **ddp,
):  # fmt: skip
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 5)).to(
        dtype
    )
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1, **ddp)
    if hook == "fp16":
        wrapped.register_comm_hook(None, fp16_compress_hook)
    if hook == "power":
        state = PowerSGDState(None, start_powerSGD_iter=10, min_compression_rate=1.1)
        wrapped.register_comm_hook(state, powerSGD_hook)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    run_dir = f"{output}/{name.replace(' ', '-')}"
    guard = SafeStep(optimizer, wrapped, run_dir=run_dir, replica_check_interval=50)
    metrics = WorkerMetrics(wrapped, pairwise_every=10**6)
    generator = torch.Generator().manual_seed(rank)
    alarms = 0
    for step in range(steps):
        if is_moved and rank == 1 and step == steps // 2:
            model[0].weight.data *= 1.0001
        optimizer.zero_grad()
        for index in range(num_batches):
            is_last = index == num_batches - 1
            inputs = torch.randn(16, 20, generator=generator).to(dtype)
            with contextlib.nullcontext() if is_last else wrapped.no_sync():
                with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
                    loss = nn.functional.cross_entropy(wrapped(inputs), torch.arange(16) % 5)
                (loss / num_batches).backward()
            report = metrics.record(loss)
        alarms += sum(event.quantity.startswith("checksum") for event in report.events)
        if is_clipped:
            nn.utils.clip_grad_norm_(wrapped.parameters(), 0.1)
        optimizer.step()
    guard.detach()
    dist.barrier()
    return alarms + sum(event["name"] == "worker" for event in read_run(run_dir).events)


if __name__ == "__main__":
    steps, output, *_ = [*sys.argv[1:], *("2000", tempfile.mkdtemp())[len(sys.argv) - 1 :]]
    run(main, 2, int(steps), output, timeout=3000)
