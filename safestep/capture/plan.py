"""Decide which of the tensors that a call computes are the logits of its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan
from typing import Any

from safestep.capture.autograd_graph import Node, is_behind, loss_side, view_chain
from safestep.capture.gradient import GradientEvidence
from safestep.capture.loss_watch import LossInput
from safestep.capture.nesting import sums_of_sums
from safestep.capture.output_form import OutputForm, examine
from safestep.capture.outputs import named_tensors, traced_loss

_HOW_TO_TELL = (
    "Pass logits=lambda output: ... to SafeStep, or tell it the whole training step, "
    "guard.record(step, *args), just before it runs, where step returns the loss; in Lightning's "
    "manual optimization StepSafety.record(i, step, *args) for optimizer i"
)


class LogitsNotFoundError(RuntimeError):
    """No tensor is known to enter a softmax; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the logits of a call are.

    Attributes:
        events: Indices of calls of loss functions, softmaxes and sigmoids.
        outputs: The tensors of the output that enter a softmax, by name, and how.
        left_out: Tensors of the output that have a gradient but enter no known softmax.
        weighed: Events whose rows may have a weight of 0 in the loss, which is read at each step.
        combined: Functions that sum over combinations of classes, one from each of many rows.
    """

    events: frozenset[int]
    outputs: Mapping[str, OutputForm]
    left_out: tuple[str, ...] = ()
    weighed: frozenset[int] = frozenset()
    combined: tuple[str, ...] = ()

    def doubts(self) -> str | None:
        """Return a sentence on each assumption about the logits, None if there is none."""
        doubts = [
            f"{name} is taken for the logits themselves: its gradient shows that it enters a "
            "softmax, and does not show whether a temperature comes between (it would for one "
            f"label in each row). {_HOW_TO_TELL}"
            for name, form in self.outputs.items()
            if not form.is_checked
        ]
        doubts += [
            f"{name}: some rows are pushed away from their label. If the loss is a function of the "
            "log-probabilities of several rows at once, as a preference loss is, r is larger than "
            f"measured. {_HOW_TO_TELL}"
            for name, form in self.outputs.items()
            if form.lowers_labels
        ]
        if self.combined:
            doubts.append(
                f"{', '.join(self.combined)}: sums over combinations of classes, as over the "
                "sequences of a conditional random field or the alignments of CTC. Measured are "
                "the classes of one row at a time; r may be larger, up to as many times as rows "
                "are combined"
            )
        if self.left_out:
            doubts.append(
                f"{', '.join(self.left_out)}: not measured, its gradient is not one of a softmax"
            )
        return "; ".join(doubts) or None


def examine_outputs(
    output: Any, gradients: Mapping[str, GradientEvidence]
) -> dict[str, OutputForm | None]:
    """Return how each tensor of an output that has a gradient enters a softmax.

    Args:
        output: What a model returned.
        gradients: What the loss's gradient showed about its tensors.

    Returns:
        The form by name; None for one that is not known to enter a softmax, such as a loss.

    Raises:
        LogitsNotFoundError: If a tensor enters a softmax at a temperature that cannot be told.
    """
    forms = {
        name: examine(tensor.detach(), gradients[name]) if tensor.numel() > 1 else None
        for name, tensor in named_tensors(output)
        if name in gradients
    }
    for name, form in forms.items():
        if form is not None and isnan(form.temperature):
            raise LogitsNotFoundError(
                f"{name} enters a softmax at a temperature of its own in each row, or at one that "
                "this precision does not show. Pass logits=lambda output: output / temperature to "
                "SafeStep, or tell it the whole training step with guard.record"
            )
    return forms


def plan_of_losses(output: Any, seen: Mapping[int, LossInput]) -> Plan:
    """Return the plan for a call that returns a loss.

    Args:
        output: What it returned, with its autograd graph: a loss, or a mapping with one in "loss".
        seen: The calls of loss functions, softmaxes and sigmoids in it.

    Returns:
        The plan.

    Raises:
        LogitsNotFoundError: If nothing of that kind lies between the loss and the model.
    """
    roots = [tensor.grad_fn for _, tensor in traced_loss(output)]
    if not roots:
        raise LogitsNotFoundError(
            "the recorded function returned no loss with a gradient; return the loss, or a dict "
            'with it in "loss"'
        )
    events = _live(roots, seen)
    if not events:
        raise LogitsNotFoundError(
            "the recorded loss holds no softmax, sigmoid or log-sum-exp between itself and the "
            "last parameters of the model; a squared error alone has no convergence radius"
        )
    return Plan(events, {}, (), _of_rows(events, seen), _combining(events, seen))


def plan_of_outputs(
    output: Any, forms: Mapping[str, OutputForm | None], seen: Mapping[int, LossInput]
) -> Plan:
    """Return the plan for a call of a model: losses inside it and outputs that enter a softmax.

    Args:
        output: What the model returned, with its autograd graph if `seen` holds anything.
        forms: What ``examine_outputs`` says of it, for every output that has a gradient.
        seen: The calls of loss functions, softmaxes and sigmoids in it.

    Returns:
        The plan. An output that a loss inside the model was computed from is part of that loss.

    Raises:
        LogitsNotFoundError: If there are none.
    """
    nodes = {name: tensor.grad_fn for name, tensor in named_tensors(output) if name in forms}
    losses = {index: item for index, item in seen.items() if item.entry.is_loss}
    unknown = [name for name, form in forms.items() if form is None]
    is_single = {name for name, tensor in named_tensors(output) if tensor.numel() == 1}
    events = _live([nodes[name] for name in unknown if name in is_single], seen)
    events |= _live([nodes[name] for name in unknown if name not in is_single], losses)
    inner = [seen[index].prediction for index in events]
    free = [name for name in forms if not any(is_behind(node, nodes[name]) for node in inner)]
    outputs: dict[str, OutputForm] = {}
    for name in free:
        form = forms[name]
        if form is not None and nodes[name] not in [nodes[other] for other in outputs]:
            outputs[name] = form
    for name in [name for name, form in outputs.items() if not form.is_evident]:
        # An attention's probabilities, a feature: part of what another output was computed from.
        if any(is_behind(nodes[other], nodes[name]) for other in free if other != name):
            del outputs[name]
    if not events and not outputs:
        raise LogitsNotFoundError(
            "the gradient of the loss does not sum to zero over the classes of any tensor that the "
            "model returns, nor is it that of a binary cross-entropy, so none is known to enter a "
            f"softmax (a squared error does not). {_HOW_TO_TELL}"
        )
    kept = [*inner, *(nodes[name] for name in outputs)]
    # What a loss inside the model was computed from behind its softmax: log-probabilities, say.
    within = loss_side([nodes[name] for name in is_single & set(unknown)], inner)
    left_out = [
        name for name in free
        if name not in outputs and not (name in is_single and events)
        and nodes[name] not in within and not any(is_behind(node, nodes[name]) for node in kept)
    ]  # fmt: skip
    return Plan(events, outputs, tuple(left_out), _of_rows(events, seen), _combining(events, seen))


def _of_rows(events: frozenset[int], seen: Mapping[int, LossInput]) -> frozenset[int]:
    """Return the events whose result has one number per row, which may be weighted."""
    return frozenset(index for index in events if not seen[index].is_reduced)


def _combining(events: frozenset[int], seen: Mapping[int, LossInput]) -> tuple[str, ...]:
    nested = sums_of_sums(events, seen)
    combining = {index for index in events if seen[index].entry.combines} | nested
    return tuple(sorted({seen[index].entry.name for index in combining}))


def _live(roots: list[Node], seen: Mapping[int, LossInput]) -> frozenset[int]:
    """Return the calls that a loss is made of, without two for the same logits."""
    stops = {item.prediction for item in seen.values() if item.entry.is_last_word}
    side = loss_side(roots, stops)
    live = {i for i, item in seen.items() if item.is_trained and item.result in side}
    softmaxes = {
        seen[index].result: index
        for index in live
        if not (seen[index].entry.is_loss or seen[index].entry.kind == "sum")
    }
    for index in [index for index in live if seen[index].entry.is_loss]:
        origin = next((n for n in view_chain(seen[index].prediction) if n in softmaxes), None)
        if origin is not None:
            softmax = softmaxes[origin]
            live.discard(softmax if _outranks(seen[index], seen[softmax]) else index)
    return frozenset(live)


def _outranks(loss: LossInput, softmax: LossInput) -> bool:
    """Return whether to read the logits of a loss rather than of the softmax before it."""
    if loss.entry.outranks_softmax != "same shape":
        return loss.entry.outranks_softmax == "always"
    (ours, _), *_ = loss.parts
    (theirs, _), *_ = softmax.parts
    return ours.shape == theirs.shape
