"""What was broken on purpose in a run's log, for ``fault_table.py``."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from safestep import SafeStep, read_run
from safestep.report import write_report
from safestep.runlog.reader import list_runs
from safestep.runlog.writer import RunLog

FAULTS: dict[str, Callable[[Path], tuple[str, str, str]]] = {}


def fault(name: str):
    """Add a function to the table: it returns what was tried, what survived and what was lost."""

    def add(function):
        FAULTS[name] = function
        return function

    return add


def write(log: RunLog, *steps: int) -> None:
    """Write one record a step."""
    for step in steps:
        log.write("step", {"step": step})


def count(path: Path) -> int:
    """Return how many steps are read."""
    return len(read_run(path).steps["step"])


def fork(folder: Path, num_steps: int) -> int:
    """Start a process that logs steps; it has all imported already. Return its id."""
    child = os.fork()
    if child == 0:
        write(RunLog(folder, {}), *range(num_steps))
        os._exit(0)
    return child


@fault("process killed while it writes")
def kill(folder):
    lost = 0
    for number in range(30):
        place = folder / str(number)
        child = fork(place, 10**6)
        while not (place / "run.jsonl").exists():
            time.sleep(0.001)
        time.sleep(0.002 * number)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            steps = read_run(place).steps["step"]
        lost += int(steps[-1]) + 1 - len(steps)
    return "30 kills", "30 logs", f"{lost} records before the one being written"


@fault("script run again in one folder")
def again(folder):
    for _ in range(3):
        os.waitpid(fork(folder, 1000), 0)
    return tell_runs(folder, 3)


@fault("three processes at once in one folder")
def at_once(folder):
    for child in [fork(folder, 1000) for _ in range(3)]:
        os.waitpid(child, 0)
    return tell_runs(folder, 3)


@fault("notebook cell run twice, first guard attached")
def cell(folder):
    logs = []
    for _ in range(2):
        logs.append(RunLog(folder, {}))
        write(logs[-1], *range(1000))
    return tell_runs(folder, 2)


def tell_runs(folder, num_runs):
    """Return the row of runs of 1,000 steps each."""
    whole = sum(count(run.path) == 1000 for run in list_runs(folder))
    return f"{num_runs} runs of 1,000 steps", f"{whole} runs", f"{num_runs - whole} runs"


@fault("folder deleted while it is written to, and made again")
def deleted(folder):
    log = RunLog(folder, {})
    write(log, 0)
    shutil.rmtree(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write(log, *range(1, 101))
        folder.mkdir()
        write(log, *range(101, 201))
    kept = count(folder)
    survived = f"training; {kept} records; {len(caught)} warning"
    return (
        "1 record before, 100 until it is there again, 100 after",
        survived,
        tell_lost(201 - kept),
    )


@fault("disk full for a while")
def full(folder):
    import resource

    log = RunLog(folder, {})
    write(log, *range(100))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 20, limit[1]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write(log, *range(100, 200))
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        write(log, *range(200, 300))
    kept = count(folder)
    survived = f"training; {kept} records; {len(caught)} warning"
    return "100 records before, 100 meanwhile, 100 after", survived, tell_lost(300 - kept)


def tell_lost(number):
    """Return a cell of how many records are lost."""
    return f"{number} records" if number else "nothing"


@fault("record torn in the middle of a log")
def torn(folder):
    log = RunLog(folder, {})
    write(log, 0)
    with log.path.open("a") as file:
        file.write('{"kind": "step", "st')
    write(log, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = count(folder)
    return "3 records around it", f"{kept} records", f"{3 - kept} records"


@fault("one list of 250,000 numbers, 700 kB log")
def long_list(folder):
    with RunLog(folder, {}) as log:
        log.write("workers", {"step": 0, "loss": [0] * 250_000})
        for step in range(1, 512):
            log.write("workers", {"step": step, "loss": [0]})
    return peak(folder)


@fault("500 keys, each in few of 1,500,000 records")
def many_keys(folder):
    return of_keys(folder, 500)


@fault("50,000 keys, each in few of 1,500,000 records")
def very_many_keys(folder):
    return of_keys(folder, 50_000)


def of_keys(folder, number):
    """Return the row of a log of so many keys."""
    with RunLog(folder, {}) as log:
        write(log, 0)
    with log.path.open("a") as file:
        file.writelines(
            f'{{"kind":"step","step":{step},"k{step % number}":1}}\n'
            for step in range(1, 1_500_000)
        )
    return peak(folder, num_steps=1_500_000, num_keys=number + 1)


@fault("500 MB that are no record, without an end, between two records")
def long_line(folder):
    log = RunLog(folder, {})
    write(log, 0)
    with log.path.open("ab") as file:
        for _ in range(500):
            file.write(b"[" * 1_000_000)
    write(log, 1)
    return peak(folder, num_steps=2)


def peak(folder, *, num_steps=0, num_keys=1):
    """Return the row of a log that is read in a process of its own: it holds so much."""
    code = (
        "import resource, sys, warnings; warnings.simplefilter('ignore'); import safestep\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3\n"
        "before = peak(); run = safestep.read_run(sys.argv[1])\n"
        "print(f'{peak() - before:.0f}', len(run.steps['step']), len(run.steps))\n"
        "print('; '.join(run.left_out))\n"
    )
    size = os.path.getsize(folder / "run.jsonl") / 1e6
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True
    )
    first, _, said = done.stdout.strip().partition("\n")
    megabytes, *found = map(int, first.split())
    lost = sum(
        max(0, mine - others) for mine, others in zip((num_steps, num_keys), found, strict=True)
    )
    survived = f"read with {megabytes} MB" + (f"; said: {said}" if said else "")
    return f"{size:.1f} MB", survived, f"{lost} records or keys" if lost else "nothing"


@fault("training killed at random moments, resumed from checkpoints")
def kill_training(folder):
    return killed(folder, "killed_run.py", 30)


@fault("the same under Lightning, checkpoints of ModelCheckpoint")
def kill_trainer(folder):
    return killed(folder, "killed_trainer.py", 10)


def killed(folder, script, kills):
    """Return the row of a run that was killed so often."""
    final = {}
    for name, number in (("whole", 0), ("killed", kills)):
        place = Path(__file__).parents[1] / "processes" / script
        command = [sys.executable, str(place), str(folder / name), str(number), "0"]
        subprocess.run(command, check=True, capture_output=True)
        final[name] = torch.load(folder / name / "final.pt", weights_only=True)
    whole, again = (state.get("parts", [state])[0] for state in final.values())
    is_same = all(torch.equal(value, whole[key]) for key, value in again.items())
    steps = len(set(read_run(folder / "whole")["step"]))
    lost = steps - len(set(read_run(folder / "killed")["step"]))
    survived = "final weights bitwise as uninterrupted" if is_same else "other weights"
    return f"{kills} x kill -9 in {steps} steps", survived, tell_lost(lost)


@fault("links to strangers' files at the report's names")
def links(folder):
    with RunLog(folder, {}) as log:
        log.write("step", {"step": 0, "normalized_step": 0.5, "scale": 1.0})
    made = list(write_report([folder]).parent.iterdir())
    mine = folder.parent / "mine"
    mine.mkdir()
    for path in made:
        (mine / path.name).write_text("mine")
        path.unlink()
        path.symlink_to(mine / path.name)
    write_report([folder])
    kept = sum(path.read_text() == "mine" for path in mine.iterdir())
    return f"{len(made)} links", f"{kept} files", f"{len(made) - kept} files"


@fault("`guard.log` of reserved names and of values that cannot be written")
def bad_values(folder):
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bad = {"step": 1, "kind": "x", "radius": 2.0, "note": [1, 2], "grad": torch.ones(3), "big": {}}
    refused = 0
    with SafeStep(optimizer, model, run_dir=folder) as guard:
        for name, value in bad.items():
            try:
                guard.log(**{name: value})
            except ValueError:
                refused += 1
            torch.nn.functional.cross_entropy(model(torch.ones(2, 4)), torch.arange(2)).backward()
            optimizer.step()
    lost = len(bad) - count(folder)
    return f"{len(bad)} calls", f"{refused} told at the call; every step", f"{lost} records"


def classifier(seed):
    """Return a model that draws nothing global, its optimizer and its guard."""
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 5))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(0.1 * torch.randn(param.shape, generator=generator))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer, SafeStep(optimizer, model, estimator="jvp"), generator


def train(seed, barrier=None):
    """Return r and weights after twenty steps, each begun together with those of other threads."""
    model, optimizer, guard, generator = classifier(seed)
    found = []
    for _ in range(20):
        if barrier is not None:
            barrier.wait()
        optimizer.zero_grad()
        logits = model(torch.randn(64, 32, generator=generator))
        torch.nn.functional.cross_entropy(logits, torch.arange(64) % 5).backward()
        optimizer.step()
        found.append(guard.last.normalized_step)
    return found, torch.nn.utils.parameters_to_vector(model.parameters()).detach()


@fault("two threads that measure at once")
def threads(folder):
    alone = [train(seed) for seed in range(2)]
    together, barrier = {}, threading.Barrier(2, timeout=60)
    started = [
        threading.Thread(target=lambda seed=seed: together.update({seed: train(seed, barrier)}))
        for seed in range(2)
    ]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    same = sum(
        together[seed][0] == r and torch.equal(together[seed][1], weights)
        for seed, (r, weights) in enumerate(alone)
    )
    return "20 steps each", f"{same} of 2: r and weights bitwise as alone", tell_lost(2 - same)


@fault("thread that draws from the global generator while steps are measured")
def draws(folder):
    drawn, stop = [], threading.Event()

    def draw():
        while not stop.is_set():
            drawn.append(float(torch.rand((), dtype=torch.float64)))
            time.sleep(2e-4)

    thread = threading.Thread(target=draw)
    thread.start()
    train(0)
    stop.set()
    thread.join()
    repeated = len(drawn) - len(set(drawn))
    return f"{len(drawn)} draws in 20 steps", "training", f"{repeated} draws come twice"


@fault("checkpoint of another run loaded")
def another_checkpoint(folder):
    state = None
    for name in ("one", "two"):
        model, optimizer, guard, _ = classifier(0)
        guard.detach()
        with SafeStep(optimizer, model, run_dir=folder / name) as guard:
            if state is not None:
                guard.load_state_dict(state)
            for _ in range(5):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(
                    model(torch.ones(2, 32)), torch.arange(2)
                ).backward()
                optimizer.step()
            state = guard.state_dict()
    one, two = (read_run(folder / name) for name in ("one", "two"))
    is_said = any(event["name"] == "resumed" for event in two.events)
    lost = 10 - len(one.steps["step"]) - len(two.steps["step"])
    survived = f"steps {two['step'][0]} to {two['step'][-1]} in the new folder, " + (
        "said to be resumed" if is_said else "not said"
    )
    return "5 steps, then 5 in another folder", survived, tell_lost(lost)


@fault("numbers over 1e300, infinite and not a number")
def huge(folder):
    with RunLog(folder, {}) as log:
        for step, r in enumerate((1e301, -1e308, float("inf"), float("nan"), 0.5)):
            log.write("step", {"step": step, "normalized_step": r, "loss": r, "scale": 1.0})
    page = write_report([folder])
    return "5 records", f"{count(folder)} records, a page of {page.stat().st_size // 1000} kB", "0"


@fault("csv of a cell of 200 kB")
def long_cell(folder):
    folder.mkdir()
    text = f"step,safestep/radius,note\n0,2.5,{'x' * 200_000}\n1,3.5,\n"
    (folder / "metrics.csv").write_text(text)
    return "2 rows", f"{count(folder)} rows", f"{2 - count(folder)} rows"
