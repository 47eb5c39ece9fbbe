"""Worker metrics on real processes beside by-hand gradients: ``ddp_scenarios.py OUTPUT [NAME]``.

Without a name it runs all scenarios but the slow one.
"""

import contextlib
import copy
import dataclasses
import sys
from unittest import mock

import torch
import torch.distributed as dist
from launch import run
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from safestep.workers.metrics import WorkerMetrics

STEPS = 3


class Net(nn.Module):
    """Three layers, an embedding, and a branch that a call may leave unused."""

    def __init__(self, *, sparse=False):
        super().__init__()
        self.embedding = nn.Embedding(7, 20, sparse=sparse)
        self.body = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh())
        self.branch = nn.Linear(40, 40)
        self.head = nn.Linear(40, 5)

    def forward(self, tokens, use_branch=True):
        hidden = self.body(self.embedding(tokens))
        return self.head(hidden + self.branch(hidden) if use_branch else hidden)


class Setup:
    """One scenario on a subgroup: a DDP model, its metrics, and a plain copy as the reference."""

    def __init__(
        self,
        group,
        *,
        hook=None,
        metrics=None,
        dtype=torch.float32,
        sparse=False,
        compiled=False,
        **ddp,
    ):
        torch.manual_seed(0)
        self.group, self.rank = group, dist.get_rank(group)
        self.num_workers = dist.get_world_size(group)
        model = Net(sparse=sparse).to(dtype)
        self.reference = copy.deepcopy(model)
        self.ddp = DistributedDataParallel(
            model, process_group=group, **{"bucket_cap_mb": 0.005, **ddp}
        )
        if hook:
            is_power = hook in (powerSGD_hook, power_in_turn)
            state = PowerSGDState(group, start_powerSGD_iter=2) if is_power else group
            self.ddp.register_comm_hook(state, hook)
        self.forward = torch.compile(self.ddp, backend="aot_eager") if compiled else self.ddp
        self.metrics = WorkerMetrics(self.forward, **{"pairwise_every": 1, **(metrics or {})})
        self.optimizer = torch.optim.SGD(self.ddp.parameters(), lr=0.1)
        self.generator = torch.Generator().manual_seed(100 + self.rank)

    def batch(self):
        return torch.randint(7, (8,), generator=self.generator), torch.randint(
            5, (8,), generator=self.generator
        )

    def loss(self, model, batch, **kwargs):
        tokens, labels = batch
        return nn.functional.cross_entropy(model(tokens, **kwargs), labels)

    def by_hand(self, batches, **kwargs):
        """Return every worker's mean loss and gradient at the current parameters, [N], [N, P]."""
        self.reference.load_state_dict(self.ddp.module.state_dict())
        self.reference.zero_grad()
        losses = []
        for batch in batches:
            loss = self.loss(self.reference, batch, **kwargs)
            (loss / len(batches)).backward()
            losses.append(loss.item())
        gradient = flat_gradient(self.reference)
        loss = torch.tensor([sum(losses) / len(losses)], dtype=torch.float64)
        return gather(loss, self.group)[:, 0], gather(gradient, self.group)

    def micro_by_hand(self, batches):
        """Return every worker's loss and gradient norm of each of its batches, [M, N]."""
        losses, norms = [], []
        for batch in batches:
            self.reference.zero_grad()
            loss = self.loss(self.reference, batch)
            loss.backward()
            losses.append(loss.item())
            norms.append(flat_gradient(self.reference).norm().item())
        mine = torch.tensor([losses, norms], dtype=torch.float64)
        return gather(mine, self.group).permute(1, 2, 0)

    def snapshot(self, report, losses, gradients):
        return {
            "report": dataclasses.asdict(report),
            "losses": losses,
            "gradients": gradients,
            "mean": flat_gradient(self.ddp.module),
            "buckets": self.buckets(),
        }

    def buckets(self):
        """Return the sizes in bytes of DDP's first buckets, and of those formed after a step."""
        data = self.ddp._get_ddp_logging_data()
        names = ("bucket_sizes", "rebuilt_bucket_sizes")
        return [[int(size) for size in data.get(name, "").split(", ") if size] for name in names]


def power_in_turn(state, bucket):
    """PowerSGD that ends one bucket before the next: on gloo it mixes up those under way at once.

    That is so without worker metrics too: ranks hang or abort.
    """
    future = powerSGD_hook(state, bucket)
    future.wait()
    return future


def flat_gradient(model):
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([grad.to_dense().flatten().double() for grad in grads])


def gather(tensor, group):
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, tensor, group=group)
    return torch.stack(everyone)


def steps(setup, **kwargs):
    """Plain steps; the last has the buckets that re-formed after the first."""
    for _ in range(STEPS):
        batch = setup.batch()
        by_hand = setup.by_hand([batch], **kwargs)
        setup.optimizer.zero_grad()
        loss = setup.loss(setup.forward, batch, **kwargs)
        loss.backward()
        report = setup.metrics.record(loss)
        found = setup.snapshot(report, *by_hand)
        setup.optimizer.step()
    return found


def unused(setup):
    """The first rank leaves a branch out."""
    return steps(setup, use_branch=setup.rank > 0)


def accumulation(setup, inside=True):
    """Three micro-batches, two under no_sync; the record made inside that context, or after it."""
    for _ in range(STEPS):
        batches = [setup.batch() for _ in range(3)]
        by_hand = setup.by_hand(batches)
        setup.optimizer.zero_grad()
        for index, batch in enumerate(batches):
            with setup.ddp.no_sync() if index < 2 else contextlib.nullcontext():
                loss = setup.loss(setup.ddp, batch)
                (loss / 3).backward()
                report = setup.metrics.record(loss) if inside else None
            report = report if inside else setup.metrics.record(loss)
            assert (report is not None) == (index == 2)
        found = setup.snapshot(report, *by_hand)
        found["micro"] = setup.micro_by_hand(batches)
        setup.optimizer.step()
    return found


def accumulation_uneven(setup):
    """The first rank has two micro-batches, the others three; a message a step after the first."""
    counts = []
    for _ in range(STEPS):
        number = 2 if setup.rank == 0 else 3
        setup.optimizer.zero_grad()
        with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as messages:
            for index in range(number):
                is_last = index == number - 1
                with contextlib.nullcontext() if is_last else setup.ddp.no_sync():
                    loss = setup.loss(setup.ddp, setup.batch())
                    (loss / number).backward()
                    report = setup.metrics.record(loss)
        counts.append(messages.call_count)
        setup.optimizer.step()
    return {"report": dataclasses.asdict(report), "messages": counts}


def accumulation_outside(setup):
    return accumulation(setup, inside=False)


def accumulation_unused_last(setup):
    """A branch that only the first micro-batch uses still has its gradient reduced."""
    batches = [setup.batch() for _ in range(2)]
    setup.reference.load_state_dict(setup.ddp.module.state_dict())
    for index, batch in enumerate(batches):
        (setup.loss(setup.reference, batch, use_branch=index == 0) / 2).backward()
    gradients = gather(flat_gradient(setup.reference), setup.group)
    with setup.ddp.no_sync():
        (setup.loss(setup.ddp, batches[0]) / 2).backward()
        setup.metrics.record(torch.tensor(1.0))
    (setup.loss(setup.ddp, batches[1], use_branch=False) / 2).backward()
    report = setup.metrics.record(torch.tensor(1.0))
    return setup.snapshot(report, torch.ones(setup.num_workers), gradients)


def scaled(setup):
    """A loss scaler, which multiplies gradients by 2^10."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    setup.metrics.detach()
    setup.metrics = WorkerMetrics(setup.ddp, scaler=scaler)
    batch = setup.batch()
    losses, gradients = setup.by_hand([batch])
    loss = setup.loss(setup.ddp, batch)
    scaler.scale(loss).backward()
    report = setup.metrics.record(loss)
    scaler.unscale_(setup.optimizer)
    return setup.snapshot(report, losses, gradients)


def harmless(setup):
    """The parameters after training with the metrics and without."""
    steps(setup)
    with_metrics = torch.nn.utils.parameters_to_vector(setup.ddp.parameters()).detach()
    bare = Setup(setup.group)
    bare.metrics.detach()
    for _ in range(STEPS):
        bare.optimizer.zero_grad()
        bare.loss(bare.ddp, bare.batch()).backward()
        bare.optimizer.step()
    without = torch.nn.utils.parameters_to_vector(bare.ddp.parameters()).detach()
    return {"with": with_metrics, "without": without}


def intervals(setup):
    """Every second step is measured, every second of those with pairs."""
    reports = []
    for _ in range(5):
        setup.optimizer.zero_grad()
        loss = setup.loss(setup.ddp, setup.batch())
        loss.backward()
        reports.append(setup.metrics.record(loss))
    return [report and (report.step, report.pairwise_cosine) for report in reports]


def non_finite(setup):
    """The last rank's loss is NaN from the second step on."""
    events = []
    for step in range(3):
        loss = setup.loss(setup.ddp, setup.batch())
        if step and setup.rank == setup.num_workers - 1:
            loss = loss * torch.nan
        setup.optimizer.zero_grad()
        loss.backward()
        events.append(setup.metrics.record(loss).events)
    return [[event.message for event in found] for found in events]


def scaled_loss(setup):
    """From the tenth step on the third rank's loss is eight times too large."""
    events = []
    for step in range(50):
        loss = setup.loss(setup.ddp, setup.batch())
        if step >= 10 and setup.rank == 2:
            loss = loss * 8
        setup.optimizer.zero_grad()
        loss.backward()
        events += setup.metrics.record(loss).events
    return [(event.rank, event.step) for event in events]


def drifted(setup):
    """After the third step one weight of the last rank moves by one unit in its last place."""
    messages = []
    for step in range(6):
        if step == 3 and setup.rank == setup.num_workers - 1:
            with torch.no_grad():
                bias = setup.ddp.module.head.bias
                bias[0] = torch.nextafter(bias[0], bias[0] + 1)
        loss = setup.loss(setup.ddp, setup.batch())
        setup.optimizer.zero_grad()
        loss.backward()
        messages.append([event.message for event in setup.metrics.record(loss).events])
        setup.optimizer.step()
    return messages


def hook_after(setup):
    """A comm hook that is registered after the metrics were attached."""
    setup.ddp.register_comm_hook(setup.group, fp16_compress_hook)
    return steps(setup)


class CountScalars(TorchDispatchMode):
    """Counts what waits for a number, as ``.item()`` does."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def waiting(setup):
    """How often a backward pass over many buckets, and the record after it, wait for a number."""
    counts = []
    for _ in range(STEPS):
        loss = setup.loss(setup.ddp, setup.batch())
        setup.optimizer.zero_grad()
        with CountScalars() as backward:
            loss.backward()
        with CountScalars() as record:
            setup.metrics.record(loss)
        counts.append((backward.count, record.count))
    return counts


def hooks_left(setup):
    setup.metrics.detach()
    return sum(len(p._post_accumulate_grad_hooks) for p in setup.ddp.parameters())


SCENARIOS = {
    "two ranks": (2, steps, {}),
    "three ranks": (3, steps, {}),
    "four ranks": (4, steps, {}),
    "bucket views": (3, steps, {"gradient_as_bucket_view": True}),
    "static graph": (3, steps, {"static_graph": True}),
    "unused parameters": (3, unused, {"find_unused_parameters": True}),
    "unused, bucket views": (
        3,
        unused,
        {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    ),
    "no_sync": (3, accumulation, {}),
    "no_sync, bucket views": (3, accumulation, {"gradient_as_bucket_view": True}),
    "no_sync, recorded outside": (3, accumulation_outside, {}),
    "no_sync, unused last": (
        3,
        accumulation_unused_last,
        {"find_unused_parameters": True},
    ),
    "no_sync, uneven": (3, accumulation_uneven, {}),
    "loss scaler": (3, scaled, {}),
    "float64": (3, steps, {"dtype": torch.float64}),
    "sparse": (3, steps, {"sparse": True}),
    "compiled": (2, steps, {"compiled": True, "bucket_cap_mb": 25}),
    "fp16 hook": (3, steps, {"hook": fp16_compress_hook}),
    "powerSGD hook": (3, steps, {"hook": powerSGD_hook, "bucket_cap_mb": 25}),
    "powerSGD hook, several buckets": (2, steps, {"hook": power_in_turn}),
    "harmless": (2, harmless, {}),
    "harmless, four ranks": (4, harmless, {}),
    "intervals": (3, intervals, {"metrics": {"every": 2, "pairwise_every": 2}}),
    "fp16 hook, registered later": (3, hook_after, {}),
    "scaled loss": (4, scaled_loss, {}),
    "hooks left": (2, hooks_left, {}),
    "waiting": (2, waiting, {}),
    "non-finite": (3, non_finite, {}),
    "drifted": (4, drifted, {}),
    "drifted, two ranks": (2, drifted, {}),
}


def main(rank, output, names):
    found = {}
    groups = {size: dist.new_group(range(size)) for size in (2, 3, 4)}
    for name in names or [name for name in SCENARIOS if name != "compiled"]:
        size, scenario, options = SCENARIOS[name]
        if rank < size:
            setup = Setup(groups[size], **options)
            found[name] = scenario(setup)
            setup.metrics.detach()
    torch.save(found, f"{output}/rank{rank}.pt")


if __name__ == "__main__":
    run(main, 4, sys.argv[1], sys.argv[2:])
