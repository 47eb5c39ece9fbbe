"""What ranks that train together must have in common, compared before their first step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from torch import Tensor

from safestep._warn import RaisedOnPurpose
from safestep.parallel.present import ABSENT
from safestep.parallel.ranks import Ranks
from safestep.parallel.shards import global_shape

STAGES = "stages of a pipeline"


class SetupError(RaisedOnPurpose, ValueError):
    """Ranks that train together were asked to do different things."""


def names_and_shapes(params: Sequence[Tensor], names: Mapping[Tensor, str]) -> list[str]:
    """Return a line for each parameter that is the same on every rank.

    Args:
        params: The parameters.
        names: Their names in the model.

    Returns:
        Name and shape over all ranks, such as ``"head.weight (10, 64)"``.
    """
    return [f"{names.get(p, 'outside the model')} {global_shape(p) or ''}" for p in params]


def demand_same_setup(setup: Mapping[str, Any], ranks: Ranks) -> None:
    """Raise on every rank where ranks were set up in different ways.

    One number is gathered. The setup itself follows only where that differs.

    Args:
        setup: What must be the same on every rank, by name.
        ranks: The ranks.

    Raises:
        SetupError: If ranks differ, with what differs and on which ranks.
    """
    text = json.dumps(setup, default=str)
    digest = int(sha256(text.encode()).hexdigest()[:12], 16)  # exact in float64
    digests = ranks.gather([digest], "its options, parameter names and shapes").flatten()
    present = digests[digests != ABSENT]
    if bool((present == present[0]).all()):
        return
    texts = ranks.gather_texts(text, "its options, parameter names and shapes")
    setups = {rank: json.loads(other) for rank, other in enumerate(texts) if other is not None}
    raise SetupError(_difference(setups))


def _difference(setups: Mapping[int, Mapping[str, Any]]) -> str:
    """Return the message that names what differs first, and on which ranks."""
    one = next(iter(setups.values()))
    name = next(name for name in one if any(s.get(name) != one[name] for s in setups.values()))
    if name == "parameters":
        return _difference_of_parameters({rank: setup[name] for rank, setup in setups.items()})
    return (
        f"SafeStep: expected the same `{name}` on every rank, got "
        f"{_by_value({rank: setup.get(name) for rank, setup in setups.items()})}. "
        f"{_PIPELINE if name == STAGES else _REMEDY}"
    )


def _difference_of_parameters(found: Mapping[int, Sequence[str]]) -> str:
    longest = max(map(len, found.values()))
    place = next(
        i
        for i in range(longest)
        if len({tuple(params[i : i + 1]) for params in found.values()}) > 1
    )
    seen = {
        rank: next(iter(params[place : place + 1]), "no more") for rank, params in found.items()
    }
    return (
        "SafeStep: expected the same trained parameters, by name and shape, on every rank, got at "
        f"place {place} {_by_value(seen)}. Train the same parameters everywhere. {_PIPELINE}"
    )


_REMEDY = (
    "Ranks that act differently no longer train one model: give each the same, or pass the ranks "
    "that train together as `process_group`."
)
_PIPELINE = (
    "Stages of a pipeline cannot be guarded together: logits exist on the last stage alone, and r "
    "depends on the update of all. There, attach a guard on the last stage only, with the ranks "
    "that hold it as `process_group`: its r counts that stage's parameters."
)


def _by_value(found: Mapping[int, Any]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, value in found.items():
        ranks.setdefault(str(value), []).append(rank)
    return " and ".join(
        f"{value} on rank{'s' if len(holders) > 1 else ''} {', '.join(map(str, holders))}"
        for value, holders in ranks.items()
    )
