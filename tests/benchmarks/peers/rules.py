"""Guards against bad steps, each a few lines around AdamW: what bench_peers.py compares.

StableAdamW, Stable-SPAM, schedule-free and Prodigy are taken from torch-optimi, pytorch-optimizer,
schedulefree and prodigyopt, and left out where these are not installed. The other peers are a few
lines each, from their papers; test_rules.py checks each against its paper's statement.
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec

from safestep import SafeStep

from .gradient_rules import AGC, AdaGC, Clip, SkipStep, ZClip
from .guarded_rules import (
    Adadelta,
    Certified,
    Decrease,
    Guarded,
    GuardedAdadelta,
    GuardedScheduleFree,
    Set,
)
from .packaged_rules import Prodigy, ScheduleFree, Stable, StableSPAM
from .rule import Rule
from .update_rules import LineSearch, UpdateRMS

RULES: dict[str, type[Rule]] = {
    "nothing": Rule,
    "clip_grad_norm_": Clip,
    "ZClip": ZClip,
    "AdaGC": AdaGC,
    "AGC": AGC,
    "update RMS": UpdateRMS,
    "StableAdamW": Stable,
    "Stable-SPAM": StableSPAM,
    "skip-step": SkipStep,
    "line search": LineSearch,
    "schedule-free": ScheduleFree,
    "Prodigy": Prodigy,
    "safestep, bound": Guarded,
    "safestep, certified": Certified,
    "safestep, decrease": Decrease,
    "safestep, set": Set,
    "Adadelta": Adadelta,
    "Adadelta, safestep": GuardedAdadelta,
    "schedule-free, safestep": GuardedScheduleFree,
}


_NEEDS = {
    "StableAdamW": "optimi",
    "Stable-SPAM": "pytorch_optimizer",
    "schedule-free": "schedulefree",
    "schedule-free, safestep": "schedulefree",
    "Prodigy": "prodigyopt",
}


def available() -> list[str]:
    """Return the names of the rules whose packages, and whose options of SafeStep, exist here."""
    known = inspect.signature(SafeStep).parameters
    return [
        name
        for name, rule in RULES.items()
        if (name not in _NEEDS or find_spec(_NEEDS[name]))
        and set(getattr(rule, "options", {})) <= set(known)
    ]
