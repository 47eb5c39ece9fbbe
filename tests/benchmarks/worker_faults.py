"""Plant faults on one of four workers and time the watch: ``worker_faults.py [OUTPUT.json]``.

Each run trains a small classifier on the mean gradient of four workers, computed one after the
other in this process; tests/processes/ shows that real ranks measure the same numbers. The fault
starts at step ONSET on worker FAULTY. Clean runs last 2,000 steps.
"""

import itertools
import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from safestep.dispersion import dispersion_from_sums, worker_sums
from safestep.workers.watch import WorkerWatch

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
    """A healthy rank; the subclasses' methods act on the faulty rank from the onset on."""

    def indices(self, indices, first):
        return indices

    def labels(self, labels):
        return labels

    def loss(self, loss):
        return loss

    def gradient(self, gradient, is_onset):
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
    """One bit of one element, in one step."""

    def __init__(self, bit):
        self.bit = bit

    def gradient(self, gradient, is_onset):
        if is_onset:
            gradient = gradient.clone()
            gradient.view(torch.int32)[3, 5] ^= 1 << self.bit
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


class Workers:
    """Four workers that share one model and take turns; what they say goes to the watch."""

    def __init__(self, seed, size, num_shards, fault):
        torch.manual_seed(seed)
        layers = [nn.Linear(FEATURES, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, CLASSES)]
        self.model = nn.Sequential(*layers)
        self.parameters = dict(self.model.named_parameters())
        self.fault, self.acting, self.step = fault, Fault(), 0
        layers[0].weight.register_hook(lambda g: self.acting.gradient(g, self.step == ONSET))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.inputs, self.labels = make_data(size)
        self.streams = [batches(size, seed, rank, num_shards=num_shards) for rank in range(RANKS)]
        self.first = [None] * RANKS
        self.watch = WorkerWatch(RANKS)

    def measure(self, rank):
        is_faulty = rank == FAULTY and self.step >= ONSET
        self.acting = fault = self.fault if is_faulty else Fault()
        indices = next(self.streams[rank])
        self.first[rank] = indices if self.first[rank] is None else self.first[rank]
        indices = fault.indices(indices, self.first[rank])
        outputs = self.model(self.inputs[indices])
        loss = fault.loss(cross_entropy(outputs, fault.labels(self.labels[indices])))
        gradient = torch.autograd.grad(loss, list(self.parameters.values()))
        return loss.detach().double(), dict(zip(self.parameters, gradient, strict=True))

    def train_step(self):
        """Return the watch's events."""
        losses, gradients = zip(*map(self.measure, range(RANKS)), strict=True)
        losses, sums = torch.stack(losses), worker_sums(gradients)
        found = dispersion_from_sums(losses, sums)
        norms = sums.squared_norms.sqrt()
        events = self.watch.update(self.step, losses, norms, found.cosine_to_mean)
        for name, parameter in self.parameters.items():
            parameter.grad = torch.stack([gradient[name] for gradient in gradients]).mean(0)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return events


def train(name, make_fault, size, num_shards, seed):
    """Train to the first event after the onset, or to the end, and return what was found."""
    workers = Workers(seed, size, num_shards, make_fault() if make_fault else Fault())
    events = []
    for _ in range(ONSET + FAULT_STEPS if make_fault else CLEAN_STEPS):
        events += workers.train_step()
        if make_fault and any(event.step >= ONSET for event in events):
            break
    return {
        "name": name,
        "has_fault": make_fault is not None,
        "steps": workers.step,
        "events": [[event.step, event.rank, event.message] for event in events],
    }


def main(output=None):
    results = []
    print("| run | steps | steps to the event | events |\n|---|---|---|---|")
    for options in RUNS:
        results.append(result := train(*options))
        delay = result["events"][0][0] - ONSET if result["has_fault"] and result["events"] else ""
        messages = "; ".join(message for _, _, message in result["events"]) or "none"
        print(f"| {result['name']} | {result['steps']} | {delay} | {messages} |", flush=True)
    if output:
        Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
