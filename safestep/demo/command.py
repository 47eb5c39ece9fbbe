"""Layer 3, demo: ``safestep demo``, from the options to the table and the figure."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from itertools import product
from pathlib import Path

from rich.console import Console

from safestep.demo.experiment import PROTECTIONS, Spike
from safestep.demo.jobs import Job, run_jobs
from safestep.demo.summary import caption, summary_tables
from safestep.demo.tasks import ARCHITECTURES, TextTask, make_task

DESCRIPTION = """\
Multiply the learning rate in the middle of a training run, and train on: plainly, with gradient
clipping at 1, and with safestep on the bound and on the certified radius. Prints a table, and
writes the run logs and a figure."""
NO_SPIKE = Spike(1.0, is_held=False)
_QUICK_ARCHITECTURES = ("transformer", "mlp")
_FULL_SEVERITIES = (10.0, 100.0, 1000.0, 10_000.0)
_FULL_SEEDS = {"cnn": 3}  # the others have five


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``safestep demo`` to a parser.

    Args:
        parser: The parser of the subcommand.
    """
    parser.description = DESCRIPTION
    parser.add_argument(
        "--task", choices=("digits", "text"), default="digits",
        help="scikit-learn's digits, or a character GPT on Python's own source (some minutes)",
    )  # fmt: skip
    parser.add_argument(
        "--architecture", nargs="+", choices=ARCHITECTURES, metavar="NAME",
        help=f"models for the digits: {', '.join(ARCHITECTURES)} (default: transformer mlp)",
    )  # fmt: skip
    parser.add_argument(
        "--severity", nargs="+", type=_severity, metavar="FACTOR",
        help="factors on the learning rate (default: 10000, text: 1000)",
    )  # fmt: skip
    duration = parser.add_mutually_exclusive_group()
    duration.add_argument(
        "--held", action="store_true", help="from the spike on (default for the digits)"
    )
    duration.add_argument(
        "--single", action="store_true", help="for one step (default for the text)"
    )
    parser.add_argument("--seeds", type=_positive, metavar="N", help="number of seeds (default: 1)")
    parser.add_argument(
        "--full", action="store_true",
        help="all that the options leave open: every severity, held and single, every "
        "architecture, 5 seeds (cnn: 3)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="a new or empty folder for run logs and figures (default: safestep-demo, -2, ...)",
    )  # fmt: skip


def run(arguments: Namespace) -> int:
    """Run the demo.

    Args:
        arguments: Options as parsed by a parser that `add_arguments` was given.

    Returns:
        Exit status: 0.
    """
    output = _output_folder(arguments.output)
    outcomes = run_jobs(plan(arguments), output)
    # Here because it imports matplotlib, which nothing else of the demo needs.
    from safestep.demo.figure import save_figures

    console = Console()
    console.print(*summary_tables(outcomes), caption(outcomes), sep="\n")
    for path in save_figures(outcomes, output):
        console.print(f"figure    {path}", soft_wrap=True, highlight=False)
    console.print(f"run logs  {output}", soft_wrap=True, highlight=False)
    return 0


def plan(arguments: Namespace) -> list[Job]:
    """Return the runs that the options ask for, the plain one without a spike first.

    Args:
        arguments: The parsed options.

    Returns:
        The jobs, slowest model first.

    Raises:
        ValueError: If `--architecture` is given for the text.
    """
    is_text = arguments.task == "text"
    if is_text and arguments.architecture:
        raise ValueError(
            "safestep demo: expected no `--architecture` with `--task text`, got "
            f"{' '.join(arguments.architecture)}. Leave it out: the text has one model, a GPT."
        )
    names = [TextTask.name] if is_text else _architectures(arguments)
    severities = arguments.severity or (
        _FULL_SEVERITIES if arguments.full else (1000.0,) if is_text else (10_000.0,)
    )
    spikes = [
        Spike(severity, is_held)
        for is_held, severity in product(_durations(arguments), severities)
        if severity != 1
    ]
    jobs = []
    for name in names:
        make_task(name)  # missing data is noticed here, before anything runs
        num_seeds = arguments.seeds or (_FULL_SEEDS.get(name, 5) if arguments.full else 1)
        ways = [(NO_SPIKE, way) for way in (PROTECTIONS if arguments.full else ("plain",))]
        ways += product(spikes, PROTECTIONS)
        jobs += [Job(name, spike, way, seed) for spike, way in ways for seed in range(num_seeds)]
    return jobs


def _architectures(arguments: Namespace) -> list[str]:
    asked = arguments.architecture or (ARCHITECTURES if arguments.full else _QUICK_ARCHITECTURES)
    return [name for name in ARCHITECTURES if name in asked]


def _durations(arguments: Namespace) -> tuple[bool, ...]:
    """Return whether the spike is held: one answer, or both."""
    if arguments.held or arguments.single:
        return (arguments.held,)
    return (True, False) if arguments.full else (arguments.task == "digits",)


def _output_folder(asked: Path | None) -> Path:
    # A new or empty folder: a run log never gets mixed with an older one.
    if asked is None:
        names = ["safestep-demo", *(f"safestep-demo-{number}" for number in range(2, 1000))]
        return next(Path(name).resolve() for name in names if not Path(name).exists())
    if asked.exists() and (not asked.is_dir() or any(asked.iterdir())):
        raise ValueError(
            f"safestep demo: expected `--output` to be a new or an empty folder, got {asked}, "
            "which is not. Choose another, or delete it."
        )
    return asked.resolve()


def _severity(text: str) -> float:
    try:
        severity = float(text)
    except ValueError:
        severity = 0.0
    if not 1 <= severity < float("inf"):
        raise ArgumentTypeError(f"expected a factor of 1 or more, such as 10000, got {text!r}")
    return severity


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)
