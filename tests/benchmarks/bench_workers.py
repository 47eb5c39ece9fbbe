"""What the worker metrics cost: ``bench_workers.py [--ranks 2] [--steps 20] [--batch 16]``.

Two copies of a 10M-parameter Transformer step in turn in one run, one with metrics and one plain,
so that both see the same machine. Prints median and mean over the ratios of paired steps, in wall
and CPU time of rank 0. Give a multiple of ten steps: every tenth measures the pairwise cosine, for
which three or more ranks exchange gradients; the mean counts that as a long run does.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from safestep.workers.metrics import WorkerMetrics

sys.path.append(str(Path(__file__).parents[1] / "processes"))
from launch import run

WIDTH, LENGTH, WORDS = 384, 64, 1000
NEVER = 2**31


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 6, 4 * WIDTH, 0.0, batch_first=True) for _ in range(5)
        )
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens):
        hidden = self.tokens(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def timed_step(ddp, optimizer, tokens, metrics):
    """Return the wall and CPU seconds of one training step."""
    wall, cpu = time.perf_counter(), time.process_time()
    optimizer.zero_grad()
    loss = cross_entropy(ddp(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    if metrics:
        metrics.record(loss)
    optimizer.step()
    return time.perf_counter() - wall, time.process_time() - cpu


def bench(rank, steps, batch, pairwise_every):
    """Print the ratios of one way to measure."""
    torch.manual_seed(0)
    ddps = [DistributedDataParallel(Model()) for _ in range(2)]
    optimizers = [torch.optim.AdamW(ddp.parameters()) for ddp in ddps]
    metrics = WorkerMetrics(ddps[1], pairwise_every=pairwise_every)
    generator = torch.Generator().manual_seed(rank)
    plain, ratios = [], []
    for step in range(steps + 2):
        tokens = torch.randint(WORDS, (batch, LENGTH), generator=generator)
        # Which goes first alternates.
        order = (0, 1) if step % 2 else (1, 0)
        times = {
            index: timed_step(ddps[index], optimizers[index], tokens, metrics if index else None)
            for index in order
        }
        if step >= 2:  # buckets and buffers are made in the first steps
            plain.append(times[0][0])
            ratios.append([times[1][i] / times[0][i] for i in (0, 1)])
    metrics.detach()
    if rank == 0:
        size = sum(parameter.numel() for parameter in ddps[0].parameters()) / 1e6
        print(f"{size:.1f}M parameters, {dist.get_world_size()} ranks, batch {batch} x {LENGTH}")
        pairs = f"every {pairwise_every}" if pairwise_every < NEVER else "never"
        print(f"pairs {pairs}: plain step {statistics.median(plain):.3f} s")
        for kind, found in zip(("wall", "CPU"), zip(*ratios, strict=True), strict=True):
            median, mean = statistics.median(found), statistics.mean(found)
            print(f"  {kind}: median {median:.3f}, mean {mean:.3f}", flush=True)


def main(rank, steps, batch):
    for pairwise_every in (NEVER, 10):
        bench(rank, steps, batch, pairwise_every)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, default in (("--ranks", 2), ("--steps", 20), ("--batch", 16)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args()
    run(main, options.ranks, options.steps, options.batch, timeout=580)
