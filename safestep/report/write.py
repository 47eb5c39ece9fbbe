"""``safestep report``: from run directories to figures and one self-contained page."""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from safestep.plots.figure_registry import FIGURES, FigureKind
from safestep.report.figures import draw, save, to_svg
from safestep.report.files import make_report_folder, replace_file
from safestep.report.page import Section, ShownFigure, build_page
from safestep.report.verdict import write_verdict
from safestep.runlog.folder import FILE_NAME
from safestep.runlog.reader import Run, read_run
from safestep.runlog.series import drawable

PAGE_NAME = "report.html"
FOLLOW_SECONDS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``safestep report``.

    Args:
        parser: Its parser.
    """
    parser.add_argument(
        "runs", metavar="RUN_DIR", nargs="+", type=Path,
        help="a run directory, a run.jsonl or a metrics.csv; several are laid side by side",
    )  # fmt: skip
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="where to write; by default RUN_DIR/report"
    )
    parser.add_argument(
        "--follow", action="store_true",
        help=f"write the page anew every {FOLLOW_SECONDS} s while the run goes on; Ctrl-C ends it",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Write the report that the options ask for, and print its path.

    Args:
        arguments: The parsed options.

    Returns:
        0.
    """
    if arguments.follow:
        _follow(arguments.runs, arguments.output)
    page = write_report(arguments.runs, arguments.output)
    sys.stdout.write(f"{page}\n")
    return 0


def write_report(
    paths: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    refresh_seconds: int | None = None,
) -> Path:
    """Write the page of one run or several, and their figures as PNG and PDF.

    Args:
        paths: What `read_run` takes, for each run.
        output: Directory to write to; by default ``report`` in the first run's directory. Links in
            it are replaced, not followed.
        refresh_seconds: For a page that is written again and again, how often a browser should
            read it anew. Its figures are then not written as files of their own.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: If there is no run at a path.
        ValueError: If a log cannot be read, or the output is a file.

    Example:
        >>> import tempfile
        >>> from safestep.runlog.writer import RunLog
        >>> run_dir = tempfile.mkdtemp()
        >>> with RunLog(run_dir, {}) as log:
        ...     for step in range(3):
        ...         log.write("step", {"step": step, "normalized_step": 0.5, "status": "ok"})
        >>> write_report([run_dir]).name
        'report.html'
    """
    runs = [_read(path) for path in paths]
    labels = _labels(runs)
    folder = Path(output) if output else _default_folder(runs[0].path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"write_report: expected `output` to be a folder, got {folder}, which is a file. "
            "Choose another name, or delete the file."
        )
    make_report_folder(folder, is_chosen=output is not None)
    to_files = folder if refresh_seconds is None else None
    sections = [_section(kind, runs, labels, to_files) for kind in FIGURES]
    verdicts = [write_verdict(run) for run in runs]
    shown = [section for section in sections if section.figures]
    page = build_page(runs, labels, verdicts, shown, refresh_seconds).encode()
    replace_file(folder / PAGE_NAME, lambda file: file.write(page))
    return folder / PAGE_NAME


def _default_folder(log: Path) -> Path:
    """Return "report" beside a directory's newest run, "report-<id>" beside an earlier one."""
    is_earlier = log.suffix == ".jsonl" and log.name != FILE_NAME
    return log.with_name(f"report{log.stem.removeprefix('run')}" if is_earlier else "report")


def _read(path: str | Path) -> Run:
    with warnings.catch_warnings():
        # The page says itself what was left out.
        warnings.filterwarnings("ignore", message="read_run: ")
        return drawable(read_run(path))


def _section(
    kind: FigureKind, runs: Sequence[Run], labels: Sequence[str], folder: Path | None
) -> Section:
    """Return one kind of figure of every run that has it, written as files too in a folder."""
    shown = []
    for place, figure in enumerate(draw(kind, runs)):
        if figure is None:
            continue
        name = kind.name if len(runs) == 1 else f"{kind.name}-{place + 1}"
        shown.append(ShownFigure(to_svg(figure, name), kind.says(runs[place]), labels[place]))
        if folder:
            save(figure, folder / name)
    return Section(kind.caption, shown, kind.is_first)


def _labels(runs: Sequence[Run]) -> list[str]:
    """Return the names of the runs' directories, with as many parents as tell them apart."""
    folders = [run.path.parent for run in runs]
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        labels = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label} ({place})" for place, label in enumerate(labels, start=1)]


def _follow(paths: Sequence[Path], output: Path | None) -> None:
    """Write the page again whenever the logs have grown, until interrupted."""
    seen: list[int] = []
    try:
        while True:
            sizes = [_size(path) for path in paths]
            if sizes != seen and all(sizes):
                page = write_report(paths, output, refresh_seconds=FOLLOW_SECONDS)
                sys.stdout.write(f"{page}\n" if not seen else "")
                sys.stdout.flush()
                seen = sizes
            time.sleep(FOLLOW_SECONDS)
    except KeyboardInterrupt:
        return


def _size(path: Path) -> int:
    """Return the size of a run's file, 0 before its first record."""
    try:
        return _read(path).path.stat().st_size
    except FileNotFoundError:
        return 0
