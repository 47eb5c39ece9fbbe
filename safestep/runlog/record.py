"""One line of ``run.jsonl``: how a record becomes strict JSON, and what a header must have."""

import json
import math
from importlib import metadata
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
KINDS = ("step", "workers", "micro", "event")


def encode(record: dict[str, Any]) -> bytes:
    """Return the record as one line of strict ASCII JSON, without the newline.

    Args:
        record: JSON values, non-finite floats, numpy or torch scalars and arrays.

    Returns:
        The line. Non-finite numbers are the strings "nan", "inf" and "-inf".

    Example:
        >>> encode({"loss": [1.5, float("nan")]})
        b'{"loss": [1.5, "nan"]}'
    """
    try:
        return json.dumps(record, allow_nan=False).encode()
    except (ValueError, TypeError):  # the common record needs no walk through its values
        return json.dumps(_jsonable(record), allow_nan=False).encode()


def line_of(kind: str, run: str, body: bytes) -> bytes:
    r"""Return the line of a record, newline included.

    Args:
        kind: Its kind.
        run: The run that it belongs to.
        body: The rest of it, as `encode` returned it.

    Example:
        >>> line_of("step", "a", encode({"step": 0}))
        b'{"kind": "step", "run": "a", "step": 0}\n'
    """
    start = encode({"kind": kind, "run": run})[:-1]
    return start + (b", " if len(body) > 2 else b"") + body[1:] + b"\n"


def make_header(run: str, started: str, world_size: int, settings: dict[str, Any]) -> bytes:
    """Return the first line of a run's file, newline included.

    Args:
        run: The id of the run.
        started: When it began, as ISO 8601 in UTC.
        world_size: Number of workers.
        settings: What the writers were asked to do.

    Returns:
        The line.
    """
    header = {
        "kind": "header",
        "schema_version": SCHEMA_VERSION,
        "run": run,
        "started": started,
        "safestep": _version("safestep"),
        "torch": _version("torch"),
        "world_size": world_size,
        "settings": settings,
    }
    return encode(header) + b"\n"


def check_header(line: bytes, path: Path) -> dict[str, Any]:
    """Return the header in a log's first line.

    Args:
        line: The first line of the file.
        path: The file, for the error.

    Returns:
        The header as a dict, ``schema_version`` and ``settings`` among its keys.

    Raises:
        ValueError: If the line is no header, or one of a newer schema.
    """
    try:
        header = json.loads(line.decode())
    except (ValueError, RecursionError):
        header = None
    version = header.get("schema_version") if isinstance(header, dict) else None
    if not isinstance(header, dict) or header.get("kind") != "header" or type(version) is not int:
        raise ValueError(
            f"run log: expected a safestep header in the first line of {path}, "
            f"got {line[:60].decode(errors='replace')!r}. Give a run directory that safestep wrote."
        )
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"run log: expected schema version <= {SCHEMA_VERSION} in {path}, got {version}. "
            "Update safestep: a newer version wrote this log."
        )
    return header


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a bare checkout on the path
        return None


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (str, int)):
        return value
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return _jsonable(value.tolist())
    return str(value)
