"""The options of a SafeStep: what they may be."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from torch import nn

from safestep.measure.estimator_registry import ESTIMATOR_OPTIONS
from safestep.radius.bounds import RUNG_OPTIONS

Action = Literal["clip", "set", "monitor"]


def check_limits(limit: float, radius: str, action: str, quantile: float | None) -> None:
    """Check the options that the decision about a step rests on.

    Raises:
        ValueError: If one has a value that it may not have.
    """
    if not (isinstance(limit, (int, float)) and 0 < limit < math.inf):
        raise ValueError(
            f"SafeStep: expected `max_normalized_step` to be a positive number, got {limit!r}. "
            "1.0 is the radius itself."
        )
    for name, value, allowed in (
        ("radius", radius, RUNG_OPTIONS),
        ("action", action, get_args(Action)),
    ):
        if value not in allowed:
            raise ValueError(
                f"SafeStep: expected `{name}` to be one of {', '.join(map(repr, allowed))}, "
                f"got {value!r}. Choose one of them."
            )
    if quantile is not None and not (isinstance(quantile, float) and 0 < quantile <= 1):
        raise ValueError(
            f"SafeStep: expected `quantile` to be None or a float in (0, 1], got {quantile!r}. "
            "0.99 leaves the one row in a hundred with the largest r out; None is certified."
        )


def check_arguments(model: Any, estimator: str, logits: Any, max_consecutive_skips: Any) -> None:
    """Check the arguments of a SafeStep but for the optimizer.

    Raises:
        TypeError: If one is of the wrong kind.
        ValueError: If one has a value that it may not have.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"SafeStep: expected `model` to be a torch.nn.Module, got {type(model).__name__}. "
            "Pass the module whose forward computes the logits."
        )
    if estimator not in ESTIMATOR_OPTIONS:
        *names, last = map(repr, ESTIMATOR_OPTIONS)
        raise ValueError(
            f"SafeStep: expected `estimator` to be {', '.join(names)} or {last}, got "
            f"{estimator!r}. 'jvp' measures every step exactly."
        )
    if logits is not None and not callable(logits):
        raise TypeError(
            f"SafeStep: expected `logits` to be callable, got {type(logits).__name__}. "
            "Pass a function from the model's output to its logits."
        )
    if not (isinstance(max_consecutive_skips, int) and max_consecutive_skips > 0):
        raise ValueError(
            "SafeStep: expected `max_consecutive_skips` to be a positive integer, got "
            f"{max_consecutive_skips!r}. 25 is the default."
        )


def check_sufficient_decrease(share: Any) -> None:
    """Check the share of the promised decrease at which a step over the limit is left alone.

    Raises:
        ValueError: If it is not None or a number in [0, 1).
    """
    is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if share is not None and not (is_number and 0 <= share < 1):
        raise ValueError(
            "SafeStep: expected `sufficient_decrease` to be None or a number in [0, 1), got "
            f"{share!r}. 0 leaves a step over the limit alone if its linearised loss does not "
            "rise, 0.5 if it falls by half of what its slope promises; None shortens every one."
        )


def check_audit_interval(interval: Any) -> None:
    """Check the interval at which steps are measured exactly to audit their gradient.

    Raises:
        ValueError: If it is not a positive integer or None.
    """
    if interval is not None and not (isinstance(interval, int) and interval > 0):
        raise ValueError(
            "SafeStep: expected `audit_interval` to be a positive integer or None, got "
            f"{interval!r}. 100 costs about a hundredth of a step."
        )


def check_replica_interval(interval: Any, has_replicas: bool) -> None:
    """Check the interval at which replicas are compared.

    Raises:
        ValueError: If it is not a positive integer or None, or given where there are no replicas.
    """
    if interval is None:
        return
    if not (isinstance(interval, int) and interval > 0):
        raise ValueError(
            "SafeStep: expected `replica_check_interval` to be a positive integer or None, got "
            f"{interval!r}. 1000 is cheap."
        )
    if not has_replicas:
        raise ValueError(
            "SafeStep: expected `replica_check_interval` to be None where every rank holds another "
            f"part of the parameters, got {interval!r}. No rank has a replica there."
        )


def check_past(rollback: Any, rollback_after: Any, keep_batches: Any, run_dir: Any) -> None:
    """Check what is kept of the past: how many steps to go back to, and how many batches.

    Raises:
        ValueError: If one is not a number of steps or files, `rollback_after` is larger than
            `rollback`, or there is no folder for files.
    """
    _check_rollback(rollback, rollback_after)
    _check_kept_batches(keep_batches, run_dir)


def _check_rollback(rollback: Any, rollback_after: Any) -> None:
    for name, value in (("rollback", rollback), ("rollback_after", rollback_after)):
        is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if value is not None and not is_count:
            raise ValueError(
                f"SafeStep: expected `{name}` to be a positive integer or None, got {value!r}. It "
                "is a number of steps."
            )
    if rollback_after is not None and (rollback is None or rollback_after > rollback):
        raise ValueError(
            f"SafeStep: expected `rollback_after` to be at most `rollback`, got {rollback_after} "
            f"and {rollback}. A run goes back to before the first of so many interventions."
        )


def _check_kept_batches(keep_batches: Any, run_dir: Any) -> None:
    is_count = isinstance(keep_batches, int) and not isinstance(keep_batches, bool)
    if not (is_count and keep_batches >= 0):
        raise ValueError(
            "SafeStep: expected `keep_batches` to be an integer of at least 0, got "
            f"{keep_batches!r}. It is the largest number of files."
        )
    if keep_batches and run_dir is None:
        raise ValueError(
            f"SafeStep: expected a `run_dir` with `keep_batches`={keep_batches}, got None. The "
            "files lie beside the run log."
        )
