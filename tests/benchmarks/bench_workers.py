"""What the worker metrics cost on two ranks: ``bench_workers.py [STEPS [BATCH]]``.

Two copies of a 10M-parameter Transformer step in turn in one run, one with metrics and one plain,
so that both see the same machine. Prints the median ratio of paired steps, in wall and CPU time.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from safestep.workers.metrics import WorkerMetrics

sys.path.append(str(Path(__file__).parents[1] / "processes"))
from launch import run

WIDTH, LENGTH, WORDS = 384, 64, 1000


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


def bench(rank, steps, batch, options):
    """Print the ratios of one way to measure."""
    torch.manual_seed(0)
    ddps = [DistributedDataParallel(Model()) for _ in range(2)]
    optimizers = [torch.optim.AdamW(ddp.parameters()) for ddp in ddps]
    metrics = WorkerMetrics(ddps[1], **options)
    generator = torch.Generator().manual_seed(rank)
    ratios, plain = [], []
    for step in range(steps + 2):
        tokens = torch.randint(WORDS, (batch, LENGTH), generator=generator)
        # Which goes first alternates.
        order = (0, 1) if step % 2 else (1, 0)
        times = {
            index: timed_step(ddps[index], optimizers[index], tokens, metrics if index else None)
            for index in order
        }
        if step >= 2:  # buckets and buffers are made in the first steps
            ratios.append([times[1][i] / times[0][i] for i in (0, 1)])
            plain.append(times[0])
    metrics.detach()
    if rank == 0:
        size = sum(parameter.numel() for parameter in ddps[0].parameters()) / 1e6
        wall, cpu = (statistics.median(ratio[i] for ratio in ratios) for i in (0, 1))
        mean = sum(ratio[1] for ratio in ratios) / len(ratios)
        base = statistics.median(seconds for seconds, _ in plain)
        print(
            f"{size:.1f}M parameters, batch {batch} x {LENGTH}, {options}: plain step {base:.3f} s,"
            f" ratio {wall:.3f} (wall), {cpu:.3f} (CPU), {mean:.3f} (CPU, mean)",
            flush=True,
        )


def main(rank, steps, batch):
    for options in ({"every": 1}, {"every": 10}):
        bench(rank, steps, batch, options)


if __name__ == "__main__":
    steps, batch = (int(value) for value in (sys.argv[1:] + ["30", "16"][len(sys.argv) - 1 :]))
    run(main, 2, steps, batch, timeout=580)
