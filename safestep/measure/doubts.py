"""Messages about measurements that are doubtful or failed."""

from __future__ import annotations

import traceback

import torch
from torch import nn

from safestep.capture import LogitsNotFoundError
from safestep.measure.estimator_registry import Estimator
from safestep.measure.finite_difference import Difference
from safestep.parallel.collectives import is_of_collective

INSTEAD = "; r is measured by finite difference instead"


def of_another_draw() -> str:
    """Return the warning of a call that gives other logits when it is repeated."""
    return (
        "a call that is repeated gives other logits: it draws from a random generator that is out "
        "of reach, and r is that of another draw"
    )


def of_a_difference(estimator: Estimator, r: float, second: Difference) -> str:
    """Return the warning of a finite difference that contradicts another estimator.

    Args:
        estimator: The other estimator.
        r: What that one measured.
        second: What the finite difference measured.
    """
    text = (
        f"two estimators of one step differ: {estimator.value} r {r:.3g}; difference {second}, "
        "which counts"
    )
    if estimator is not Estimator.JVP:
        return text
    return text + (
        ". Look for a `detach` or a kept copy of a parameter on the way to the logits: the "
        "gradient then lacks that part too"
    )


def lacks_derivative(error: BaseException, module: nn.Module) -> str:
    """Return which part of a model forward mode failed in, and why.

    Args:
        error: The error that it failed with.
        module: The model.
    """
    return f"{culprit(error, module)} has no forward-mode derivative ({first_sentence(error)})"


def may_lack_derivative(error: BaseException | None) -> bool:
    """Return whether an error may tell that a model has no forward-mode derivative.

    Args:
        error: What was raised, if anything was.
    """
    is_other = isinstance(error, (LogitsNotFoundError, torch.OutOfMemoryError))
    return isinstance(error, RuntimeError) and not (is_other or is_of_collective(error))


def culprit(error: BaseException, module: nn.Module) -> str:
    """Return the name and type of the innermost submodule that an error passed through.

    Args:
        error: An error that was raised while `module` ran.
        module: The root module.

    Returns:
        For instance ``"encoder.0.attention (Attention)"``; ``"the model"`` if none is known; with
        the name of a ``torch.autograd.Function`` before it if the error came from one.
    """
    names = {id(child): name for name, child in module.named_modules()}
    found, function = "the model", ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        child = frame.f_locals.get("self")
        if id(child) in names:
            found = f"{names[id(child)] or 'the model'} ({type(child).__name__})"
        kind = frame.f_locals.get("cls")
        if isinstance(kind, type) and issubclass(kind, torch.autograd.Function):
            function = f"{kind.__name__} in "
    return function + found


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error's message, or its type if it has none.

    Args:
        error: The error.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".")[:160]
