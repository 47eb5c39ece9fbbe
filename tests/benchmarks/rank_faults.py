"""What was broken on purpose among ranks, for ``fault_table.py``: real gloo processes each."""

import json
import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import torch

PROCESSES = Path(__file__).parents[1] / "processes"


@cache
def ranks(script, *args, num_ranks, name="rank{}.pt"):
    """Return what each rank of a script left behind; one start for all rows that ask."""
    folder = Path(mkdtemp())
    start([str(PROCESSES / script), str(folder), *args])
    return [torch.load(folder / name.format(r), weights_only=False) for r in range(num_ranks)]


def start(command):
    """Run a script to its end."""
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, *command], check=True, capture_output=True, env=quiet)


def raising(*scenarios, what):
    """Return the row of ranks that were set up in different ways."""

    def row(_):
        found = ranks("differing_ranks.py", num_ranks=3)
        errors = [rank[name] for rank in found for name in scenarios]
        # The script keeps the message only where no parameter moved.
        named = sum("expected the same" in error for error in errors)
        total = len(errors)
        tried = f"{len(scenarios)} on 3 ranks: {what}"
        return tried, f"{named} of {total} ranks told before a step", tell(total - named)

    return row


def tell(number, what="steps"):
    """Return a cell of what was lost."""
    return "nothing" if not number else f"{number} {what}"


def missing(fault):
    """Return the row of a rank that does not take part."""

    def row(folder):
        folder.mkdir(parents=True)
        start([str(PROCESSES / "lone_guard.py"), str(folder), fault])
        found = json.loads((folder / "rank0.json").read_text())
        waited = found["error"].partition("ranks to ")[2].partition(", got nothing")[0]
        survived = f"error after {found['seconds']:.1f} s: waited for it to {waited}"
        return "2 ranks, timeout 5 s", survived, tell(not found["is_unmoved"])

    return row


def joined(scenario, what):
    """Return the row of ranks that run out of data."""

    def row(_):
        found = ranks("differing_ranks.py", num_ranks=3)
        pairs = [(rank[scenario], rank[f"{scenario}, unguarded"]) for rank in found]
        alike = sum(
            all(torch.equal(value, other["after"][name]) for name, value in one["after"].items())
            for one, other in pairs
        )
        return what, f"{alike} of 3 ranks bitwise as unguarded", tell(3 - alike, "ranks")

    return row


def drifted(scenario, what, *, since=6, rank=2, before=6, script="differing_ranks.py", size=3):
    """Return the row of a replica that is no longer one."""

    def row(_):
        event = ranks(script, num_ranks=size)[0][scenario]["events"][0]
        is_right = (event["step"], event["rank"]) == (since, rank)
        return f"{what}, before step {before}", event["message"], tell(not is_right, "event")

    return row


replicated = partial(drifted, rank=1, script="replicated_shards.py", size=4)


def failing(fault, *, is_raised=False):
    """Return the row of ranks of which one cannot run the model that they run together."""

    def row(folder):
        folder.mkdir(parents=True)
        start([str(PROCESSES / "raising_piece.py"), str(folder), fault])
        found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
        tried = f"2 ranks, timeout 5 s, step 1 of {len(found[0])}"
        if is_raised:
            last = found[0][-1]
            error = last["error"].partition("(")[2].partition(")")[0]
            survived = f"both raise after {last['seconds']:.1f} s, before the step: {error}"
            return tried, survived, tell(not all(rank[-1]["is_unmoved"] for rank in found))
        alike = found[0] and all(len(rank) == 4 for rank in found)
        kinds = ", ".join(f"{e['status']} by {e['estimator']}" for e in found[0][:2])
        reason = (found[0][1]["reason"] or "").partition("; pass")[0]
        survived = f"4 steps: {kinds}" + (f" ({reason})" if reason else "") + ", ..."
        return tried, survived, tell(not alike)

    return row


def pipeline(scenario, what):
    """Return the row of stages that are guarded together."""

    def row(_):
        found = [rank[scenario] for rank in ranks("pipeline_stages.py", num_ranks=2)]
        named = sum("stages of a pipeline" in (rank["error"] or "") for rank in found)
        moved = sum(not all(map(torch.equal, r["start"], r["after"])) for r in found)
        return what, f"{named} of 2 ranks told before a step", tell(moved)

    return row


def restarted(folder):
    """Return the row of a rank that is killed, under torchrun."""
    finals = []
    for name, *args in (("whole",), ("restarted", "6")):
        (folder / name).mkdir(parents=True)
        start([
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "--max-restarts", "1", str(PROCESSES / "elastic_restart.py"), str(folder / name), *args,
        ])  # fmt: skip
        finals.append([torch.load(folder / name / f"final{r}.pt")["after"] for r in range(2)])
    alike = sum(all(map(torch.equal, a.values(), b.values())) for a, b in zip(*finals, strict=True))
    survived = f"{alike} of 2 ranks end bitwise as uninterrupted"
    return "kill -9 in step 6, checkpoint of step 4", survived, tell(2 - alike, "ranks")


def raised_while_measured(_):
    """Return the row of a rank on which a measurement fails."""
    found = ranks("guarded_ranks.py", "2", num_ranks=2)
    reports = found[0]["raises"]["reports"]
    named = sum((report.reason or "").startswith("rank 1: ") for report in reports)
    steps = len(reports)
    return f"{steps} steps", f"{steps} steps; {named} reasons name the rank", tell(steps - named)


def tensor_parallel(scenario, what):
    """Return the row of ranks that hold pieces of each layer, beside the whole model."""

    def row(_):
        found = ranks("tensor_parallel.py", "2", num_ranks=2)[0]
        pairs = zip(
            *(found[mode][scenario]["reports"] for mode in ("tensor", "whole")), strict=True
        )
        off = [
            abs(one["normalized_step"] / whole["normalized_step"] - 1)
            for one, whole in pairs
            if one["status"] == whole["status"] != "skipped"
        ]
        logits = (found[mode][scenario]["logits"] for mode in ("tensor", "whole"))
        moved = float(torch.sub(*logits).abs().amax())
        survived = f"r off by {max(off):.0e} at most; logits after three steps by {moved:.0e}"
        finite = all(piece.isfinite().all() for piece in found["tensor"][scenario]["after"])
        return what, survived, tell(0 if finite and moved < 1e-4 else 1, "model")

    return row


def sharded_workers(_):
    """Return the row of gradients that no rank holds after backward."""
    found = ranks("sharded_workers.py", "2", num_ranks=2)[0]["plain"]
    pairs = [p for p in zip(found["reports"], found["references"], strict=False) if p[0]]
    off = max(
        float((torch.tensor(report["grad_norm"]) / gradients.norm(dim=1) - 1).abs().amax())
        for report, (_, gradients, *_) in pairs
    )
    survived = f"each rank's own gradient norm, off by {off:.0e} at most"
    return f"2 ranks, {len(pairs)} steps", survived, tell(int(off > 1e-4), "metric")


def flattened(_):
    """Return the row of Lightning's FSDPStrategy, for which a subclass stands in on a CPU."""
    names = ("flattened", "flattened, unguarded")
    watched, bare = (
        ranks("sharded_trainer.py", "2", *names, num_ranks=2, name=f"{name} {{}}.pt")[0]
        for name in names
    )
    reports = watched["reports"]
    measured = sum(report["estimator"].startswith("difference") for report in reports)
    survived = f"{measured} of {len(reports)} steps measured by difference"
    return f"2 ranks, {len(bare['batches'])} steps", survived, tell(len(reports) - measured)


FAULTS = {
    "rank with another option": raising(
        "action", "limit", "copy", "estimator", what="action, limit, copy, estimator"
    ),
    "rank with another optimizer": raising("optimizer", what="SGD for Adam"),
    "rank with other parameters": raising("shape", "names", what="shape, name"),
    "rank that resumed elsewhere": raising("resumed", what="40 steps ahead"),
    "rank without a guard": missing("unguarded"),
    "rank that ended": missing("ends"),
    "rank killed, `torchrun --max-restarts 1`": restarted,
    "rank on which the model raises when it is run again": raised_while_measured,
    "uneven inputs, `ddp.join()`": joined("joined", "4, 7 and 5 batches"),
    "the same, GradScaler leaves a step out": joined("joined, scaled", "4, 7 and 5 batches"),
    "replica moved by 0.01 % in one layer": drifted("weights", "1 of 3 ranks"),
    "optimizer state moved by 0.01 %": drifted("momentum", "1 of 3 ranks"),
    "one bit of a replica, checksums each 4 steps": drifted("one bit", "1 of 3 ranks", since=7),
    "one replica of two moved": drifted("two replicas", "1 of 2 ranks", rank=0),
    "shard of one of two replicas moved (HSDP)": replicated("weights", "1 of 2 x 2 ranks"),
    "its optimizer state moved": replicated("state", "1 of 2 x 2 ranks"),
    "shard of one of four replicas moved": replicated("majority", "1 of 4 x 1 ranks", rank=3),
    "replicas of shards that begin with other weights": replicated(
        "another start", "2 of 2 x 2 ranks", since=0, rank=0, before=0
    ),
    "piece of a layer moved (tensor parallelism in DDP)": replicated("pieces", "1 of 2 x 2 ranks"),
    "rank that cannot run its piece of the model again": failing("calls"),
    "rank that raises in it at the end": failing("after"),
    "rank that raises in it while the other waits": failing("before", is_raised=True),
    "pieces without a forward-mode derivative": failing("forward"),
    "pieces of layers (tensor parallelism), steps over the limit": tensor_parallel(
        "clipped", "2 ranks, 3 steps"
    ),
    "the same, one step not finite": tensor_parallel("skipped", "2 ranks, 3 steps"),
    "gradients that `fully_shard` reduces": sharded_workers,
    "Lightning's FSDPStrategy (a subclass, on a CPU)": flattened,
    "stages of a pipeline guarded together": pipeline("both", "2 stages"),
    "the same, stages of one shape": pipeline("both, of one shape", "2 stages"),
}
