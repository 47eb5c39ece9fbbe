"""Read safestep's logged names out of the metrics.csv of Lightning's CSVLogger."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from safestep.runlog.columns import ColumnBuilder
from safestep.runlog.table import Columns

LOSS_NAMES = ("loss", "train_loss", "train/loss", "train_loss_step", "train/loss_step", "loss_step")
_RENAMED = {"effective_lr": "effective_learning_rate", "lr": "learning_rate"}


def read_metrics_csv(path: Path) -> tuple[dict[str, Any], Columns, Columns]:
    """Return header, step columns and worker columns of a metrics.csv.

    Columns ``safestep/*`` make the step records, ``workers/*`` the worker records, the first of
    ``LOSS_NAMES`` that is there the loss. A CSV has no status: a scale under 1 is read as
    "clipped", a scale of 0 as "skipped".

    Args:
        path: The metrics.csv.

    Returns:
        Header (a dict that says where it came from), columns of steps, columns of workers.

    Raises:
        ValueError: If no column of the file is one of safestep's.
    """
    with (
        path.open(newline="", encoding="utf-8", errors="replace") as file,
        _cells_up_to(path.stat().st_size),
    ):
        rows = csv.DictReader(file)
        fields = _wanted_fields(list(rows.fieldnames or []))
        if not any(kind != "loss" for kind, _ in fields.values()) or "step" not in (
            rows.fieldnames or []
        ):
            raise ValueError(
                f"read_run: expected columns `step` and `safestep/...` or `workers/...` in {path}, "
                f"got {list(rows.fieldnames or [])[:8]}. Log with the callbacks of "
                "safestep.callbacks."
            )
        steps, workers = _merge_rows(rows, fields, path)
    columns = steps.build()
    _join_optimizers(columns)
    if "scale" in columns:
        scale = columns["scale"]
        status = np.where(scale == 0, "skipped", np.where(scale < 1, "clipped", "ok"))
        columns["status"] = status.astype(object)
        if "effective_learning_rate" in columns and "learning_rate" not in columns:
            rate, part = columns["effective_learning_rate"], columns.get("scale/0", scale)
            with np.errstate(divide="ignore", invalid="ignore"):
                columns["learning_rate"] = rate / part
    return {"kind": "header", "source": path.name}, columns, workers.build()


def _join_optimizers(columns: Columns) -> None:
    # Several optimizers log a column each, "scale/0" and so on, and the sum of their r.
    for name, join in (("scale", np.fmin), ("step_norm", np.hypot)):
        parts = [columns[key] for key in columns if key.startswith(f"{name}/")]
        if parts:
            columns[name] = reduce(join, parts)
    if "effective_learning_rate/0" in columns:
        columns["effective_learning_rate"] = columns["effective_learning_rate/0"]
    if "radius" not in columns and {"step_norm", "normalized_step"} <= columns.keys():
        with np.errstate(divide="ignore", invalid="ignore"):
            columns["radius"] = columns["step_norm"] / columns["normalized_step"]


def _wanted_fields(names: list[str]) -> dict[str, tuple[str, str]]:
    """Return by CSV column the kind of record it belongs to and its name there."""
    fields = {}
    for name in names:
        prefix, _, field = name.partition("/")
        if prefix in {"safestep", "workers"} and field:
            field, slash, optimizer = field.partition("/")
            fields[name] = (prefix, _RENAMED.get(field, field) + slash + optimizer)
    loss = next((name for name in LOSS_NAMES if name in names), None)
    if loss is not None:
        fields[loss] = ("loss", "loss")
    return fields


def _merge_rows(
    rows: csv.DictReader, fields: dict[str, tuple[str, str]], path: Path
) -> tuple[ColumnBuilder, ColumnBuilder]:
    """Return steps and workers; rows of one step are joined, as a logger writes one a call."""
    steps, workers = ColumnBuilder(path), ColumnBuilder(path)
    numbered = enumerate(rows, start=2)
    for step, lines in groupby(numbered, key=lambda line: line[1]["step"]):
        line = 0
        merged: dict[str, dict[str, Any]] = {"safestep": {}, "workers": {}, "loss": {}}
        for line, row in lines:  # noqa: B007 (the last one is where the record ends)
            for name, (kind, field) in fields.items():
                if row[name]:
                    merged[kind][field] = row[name]
        if merged["safestep"]:
            steps.add({"step": step, **merged["safestep"], **merged["loss"]}, line)
        if merged["workers"]:
            workers.add({"step": step, **merged["workers"]}, line)
    return steps, workers


@contextmanager
def _cells_up_to(size: int) -> Iterator[None]:
    """Let cells be as long as the file; the limit of 128 kB is one of the whole csv module."""
    before = csv.field_size_limit(max(size, csv.field_size_limit()))
    try:
        yield
    finally:
        csv.field_size_limit(before)
