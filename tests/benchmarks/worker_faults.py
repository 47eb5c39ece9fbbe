"""Plant faults on one of four ranks and time the watch: ``worker_faults.py [OUTPUT.json]``.

Each run trains a small classifier with DDP and WorkerMetrics on four gloo processes, which all runs
share. The fault starts at step ONSET on rank FAULTY. Clean runs last 2,000 steps.
"""

import itertools
import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from safestep.workers.metrics import WorkerMetrics

sys.path.append(str(Path(__file__).parents[1] / "processes"))
from launch import run

RANKS, FAULTY, ONSET = 4, 2, 300
FAULT_STEPS, CLEAN_STEPS = 600, 2000
BATCH, FEATURES, CLASSES = 16, 24, 8


def make_data(size):
    """Return inputs and labels of a linear teacher, one label in ten drawn anew."""
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(size, FEATURES, generator=generator)
    teacher = torch.randn(FEATURES, CLASSES, generator=generator)
    labels = (inputs @ teacher).argmax(1)
    noisy = torch.rand(size, generator=generator) < 0.1
    labels[noisy] = torch.randint(CLASSES, (int(noisy.sum()),), generator=generator)
    return inputs, labels


def batches(size, seed, rank, *, num_shards=RANKS):
    """Yield this rank's indices for ever: a new permutation an epoch, dealt out to the ranks."""
    for epoch in itertools.count():
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        mine = torch.randperm(size, generator=generator)[rank % num_shards :: num_shards]
        yield from mine.split(BATCH)[: len(mine) // BATCH]


class Fault:
    """Nothing is wrong; the subclasses act on the faulty rank from the onset on."""

    def indices(self, indices, first):
        return indices

    def labels(self, labels):
        return labels

    def loss(self, loss):
        return loss

    def gradient(self, gradient):
        return gradient


class ShuffledLabels(Fault):
    def labels(self, labels):
        return labels.roll(1)


class RepeatedBatch(Fault):
    def indices(self, indices, first):
        return first


class OtherSeed(Fault):
    """From the onset on this rank's shard is cut from another permutation."""

    def __init__(self):
        self.stream = batches(20_000, 99, FAULTY)

    def indices(self, indices, first):
        return next(self.stream)


class ScaledLoss(Fault):
    def __init__(self, factor):
        self.factor = factor

    def loss(self, loss):
        return loss * self.factor


class BitFlip(Fault):
    """One bit of one element, in one step, before the gradient enters a bucket."""

    def __init__(self, bit):
        self.mask = 1 << bit

    def gradient(self, gradient):
        gradient = gradient.clone()
        gradient.view(torch.int32)[3, 5] ^= self.mask
        self.mask = 0
        return gradient


class NonFinite(Fault):
    def loss(self, loss):
        return loss * torch.nan


# Name, fault, size of the data, number of shards, seed.
RUNS = [
    ("clean, fresh data", None, 20_000, RANKS, 0),
    ("clean, fresh data", None, 20_000, RANKS, 1),
    ("clean, memorised data", None, 1_000, RANKS, 2),
    ("shuffled labels", ShuffledLabels, 20_000, RANKS, 3),
    ("one batch repeated", RepeatedBatch, 20_000, RANKS, 4),
    ("another seed, data dealt out", OtherSeed, 20_000, RANKS, 5),
    ("another seed, others in step", OtherSeed, 20_000, 1, 6),
    ("loss x 8", lambda: ScaledLoss(8.0), 20_000, RANKS, 7),
    ("loss x 1.5", lambda: ScaledLoss(1.5), 20_000, RANKS, 8),
    ("bit 30 flipped once", lambda: BitFlip(30), 20_000, RANKS, 9),
    ("bit 23 flipped once", lambda: BitFlip(23), 20_000, RANKS, 10),
    ("NaN", NonFinite, 20_000, RANKS, 11),
]


class Training:
    """One rank's part in the training of a new model."""

    def __init__(self, rank, fault, size, num_shards, seed):
        torch.manual_seed(seed)
        layers = [nn.Linear(FEATURES, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, CLASSES)]
        self.ddp = DistributedDataParallel(nn.Sequential(*layers))
        torch.manual_seed(1000 * seed + rank)  # dropout
        self.rank, self.fault, self.acting, self.step = rank, fault, Fault(), 0
        layers[0].weight.register_hook(lambda gradient: self.acting.gradient(gradient))
        self.optimizer = torch.optim.SGD(self.ddp.parameters(), lr=0.1, momentum=0.9)
        self.inputs, self.labels = make_data(size)
        self.stream = batches(size, seed, rank, num_shards=num_shards)
        self.first = next(batches(size, seed, rank, num_shards=num_shards))
        self.metrics = WorkerMetrics(self.ddp)

    def train_step(self):
        """Return the events, which all ranks see."""
        if self.rank == FAULTY and self.step == ONSET:
            self.acting = self.fault
        indices = self.acting.indices(next(self.stream), self.first)
        labels = self.acting.labels(self.labels[indices])
        loss = self.acting.loss(cross_entropy(self.ddp(self.inputs[indices]), labels))
        self.optimizer.zero_grad()
        loss.backward()
        report = self.metrics.record(loss)
        nn.utils.clip_grad_norm_(self.ddp.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return report.events


def train(rank, name, make_fault, *options):
    """Train to the first event after the onset, or to the end, and return what was found."""
    training = Training(rank, make_fault() if make_fault else Fault(), *options)
    events = []
    for _ in range(ONSET + FAULT_STEPS if make_fault else CLEAN_STEPS):
        events += training.train_step()
        if make_fault and any(event.step >= ONSET for event in events):
            break
    training.metrics.detach()
    return {
        "name": name,
        "has_fault": make_fault is not None,
        "steps": training.step,
        "events": [[event.step, event.rank, event.message] for event in events],
    }


def main(rank, output=None):
    results = [train(rank, *options) for options in RUNS]
    if rank == 0:
        print("| run | steps | steps to the event | events |\n|---|---|---|---|")
        for result in results:
            events = result["events"]
            delay = events[0][0] - ONSET if result["has_fault"] and events else ""
            messages = "; ".join(message for _, _, message in events) or "none"
            print(f"| {result['name']} | {result['steps']} | {delay} | {messages} |")
        if output:
            Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    run(main, RANKS, *sys.argv[1:], timeout=580)
