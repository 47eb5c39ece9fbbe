"""Decide which of the tensors that a call computes are the logits of its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isnan
from typing import Any

from safestep.capture.autograd_graph import CLAMPS, Node, is_behind, loss_side, view_chain
from safestep.capture.gradient import GradientEvidence
from safestep.capture.hidden import hidden_parts, mixes_rows
from safestep.capture.loss_graph import Use
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
        outputs: Output tensors that enter a softmax, by name, with their form.
        left_out: Output tensors that have a gradient but enter no known softmax.
        idle: Output tensors whose gradient was zero and therefore gave no evidence.
        weighed: Events whose rows may have weight 0 in the loss; the weights are read at each step.
        mixed: Whether the loss divides by a sum over rows, or takes its logarithm.
        combined: Functions that sum over combinations of classes of several rows.
        hidden: Parts of the loss whose logits are not seen, with what to do.
    """

    events: frozenset[int]
    outputs: Mapping[str, OutputForm]
    left_out: tuple[str, ...] = ()
    idle: frozenset[str] = frozenset()
    weighed: frozenset[int] = frozenset()
    mixed: bool = False
    combined: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()

    def refreshed(self, output: Any, gradients: Mapping[str, GradientEvidence]) -> Plan | None:
        """Return the plan updated from the gradients of another step.

        Args:
            output: What the model returned.
            gradients: What the loss's gradient showed about its tensors.

        Returns:
            The plan, with new temperatures if they changed; None if it has to be made anew.

        Raises:
            LogitsNotFoundError: If the loss changed, or a temperature cannot be inferred.
        """
        if any(gradients[name].is_live for name in self.idle & gradients.keys()):
            return None
        if any(form.is_stale(gradients[each]) for each, form in self.outputs.items()):
            return None
        tensors = dict(named_tensors(output))
        forms = {}
        for name, form in self.outputs.items():
            evidence = gradients[name]
            if not form.is_settled:
                forms[name] = form
                continue
            has_axis = form.class_axis is not None and evidence.class_axis is not None
            if has_axis and not evidence.sums_to_zero:
                raise LogitsNotFoundError(
                    f"the gradient at {name} no longer sums to zero over the classes, so the loss "
                    f"is another one than before. {_HOW_TO_TELL}"
                )
            forms[name] = form.refreshed(tensors[name].detach(), evidence)
        _refuse_unknown_temperatures(forms)
        return replace(self, outputs=forms) if forms != dict(self.outputs) else self

    @property
    def understates(self) -> bool:
        """Whether r may be larger than what is measured of the parts that are seen."""
        lowers = any(form.lowers_labels for form in self.outputs.values())
        return bool(self.combined or self.mixed or self.hidden or lowers)

    def doubts(self) -> str | None:
        """Return one sentence per assumption about the logits, None if there are none."""
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
        if self.mixed:
            doubts.append(
                "the loss holds a quotient or logarithm of a sum of probabilities over rows, as "
                "Dice does. It is analytic at least up to half the radius of one row, so r may be "
                "up to twice as large as measured"
            )
        doubts += [f"r may be larger than measured: {_not_seen(part)}" for part in self.hidden]
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
        LogitsNotFoundError: If a tensor enters a softmax at a temperature that cannot be inferred,
            or was changed in place in a way that its gradient does not show.
    """
    forms = {
        name: examine(tensor.detach(), gradients[name]) if tensor.numel() > 1 else None
        for name, tensor in named_tensors(output)
        if name in gradients
    }
    for name, form in forms.items():
        if form is not None and not form.is_checked and gradients[name].is_changed:
            raise LogitsNotFoundError(
                f"{name} was changed in place after the model returned it, and its gradient does "
                "not show by what: divide it out of place, and pass logits=lambda output: output / "
                "temperature to SafeStep, or tell it the whole training step with guard.record"
            )
    _refuse_unknown_temperatures(forms)
    return forms


def _refuse_unknown_temperatures(forms: Mapping[str, OutputForm | None]) -> None:
    for name, form in forms.items():
        if form is not None and isnan(form.temperature):
            raise LogitsNotFoundError(
                f"{_changed({name: form.use} if form.use else {})}{name} enters a softmax at a "
                "temperature of its own in each row, or at one that "
                "this precision or the labels, being soft, do not show. Pass "
                "logits=lambda output: output / temperature to SafeStep, or tell it the whole "
                "training step with guard.record"
            )


def plan_of_losses(output: Any, seen: Mapping[int, LossInput]) -> Plan:
    """Return the plan for a call that returns a loss.

    Args:
        output: What it returned, with its autograd graph: a loss, or a mapping with one in "loss".
        seen: The calls of loss functions, softmaxes and sigmoids in it.

    Returns:
        The plan.

    Raises:
        LogitsNotFoundError: If the call returned no loss with a gradient, or no such call lies
            between the loss and the model.
    """
    roots = [tensor.grad_fn for _, tensor in traced_loss(output)]
    if not roots:
        raise LogitsNotFoundError(
            "the recorded function returned no loss with a gradient; return the loss, or a dict "
            'with it in "loss"'
        )
    events = _live(roots, seen)
    hidden = hidden_parts(roots, {seen[index].result for index in events})
    if hidden and not events:
        raise LogitsNotFoundError("; ".join(map(_not_seen, hidden)))
    if not events:
        raise LogitsNotFoundError(
            "the recorded loss holds no softmax, sigmoid or log-sum-exp between itself and the "
            "last parameters of the model; a squared error alone has no convergence radius"
        )
    mixed = mixes_rows(roots, {seen[index].result for index in events})
    return replace(_plan(events, seen, {}), hidden=tuple(hidden), mixed=mixed)


def _not_seen(part: str) -> str:
    return f"the loss holds a part whose logits are not seen, {part}"


def plan_of_outputs(
    output: Any,
    forms: Mapping[str, OutputForm | None],
    seen: Mapping[int, LossInput],
    uses: Mapping[str, Use],
) -> Plan:
    """Return the plan for a call of a model: losses inside it and outputs that enter a softmax.

    Args:
        output: What the model returned, with its autograd graph if `seen` holds anything.
        forms: The result of ``examine_outputs``, for every output that has a gradient.
        seen: The calls of loss functions, softmaxes and sigmoids in it.
        uses: How the loss uses the outputs, where its graph was read.

    Returns:
        The plan. An output from which a loss inside the model was computed belongs to that loss.

    Raises:
        LogitsNotFoundError: If no tensor is known to enter a softmax.
    """
    nodes = {name: tensor.grad_fn for name, tensor in named_tensors(output) if name in forms}
    losses = {index: item for index, item in seen.items() if item.entry.is_loss}
    unknown = [name for name, form in forms.items() if form is None]
    is_single = {name for name, tensor in named_tensors(output) if tensor.numel() == 1}
    events = _live([nodes[name] for name in unknown if name in is_single], seen)
    events |= _live([nodes[name] for name in unknown if name not in is_single], losses)
    # A loss of probabilities is a function of them, unless they enter another softmax.
    inner = {name for name, use in uses.items() if use.changes or use.has_sigmoid}
    probabilities = _probabilities({name: nodes[name] for name in {*unknown} - inner}, seen)
    events |= frozenset(probabilities.values())
    behind = [seen[index].prediction for index in events]
    free = [name for name in forms if not any(is_behind(node, nodes[name]) for node in behind)]
    outputs: dict[str, OutputForm] = {}
    for name in free:
        form = forms[name]
        if form is not None and nodes[name] not in [nodes[other] for other in outputs]:
            outputs[name] = form
    for name in [name for name, form in outputs.items() if not form.is_evident]:
        # Such as attention probabilities or a feature: another output was computed from them.
        if any(is_behind(nodes[other], nodes[name]) for other in free if other != name):
            del outputs[name]
    open_forms = [name for name, form in forms.items() if name in uses and not _is_settled(form)]
    losses_inside = [nodes[name] for name in unknown if name in is_single]
    hidden = hidden_parts(losses_inside, {seen[index].result for index in events})
    hidden += [part for name in open_forms for part in uses[name].hidden]
    if hidden and not events and not outputs:
        raise LogitsNotFoundError("; ".join(map(_not_seen, hidden)))
    if not events and not outputs and uses and all(use.is_harmless for use in uses.values()):
        raise LogitsNotFoundError(
            "the loss holds no softmax, sigmoid or log-sum-exp of what the model returns, as far "
            f"as its graph shows (a squared error does not, nor does a hinge). {_HOW_TO_TELL}"
        )
    if not events and not outputs:
        raise LogitsNotFoundError(
            "the gradient of the loss does not sum to zero over the classes of any tensor that the "
            "model returns, nor is it that of a binary cross-entropy, so none is known to enter a "
            f"softmax (a squared error does not). {_changed(uses)}{_HOW_TO_TELL}"
        )
    kept = [*behind, *(nodes[name] for name in outputs)]
    # Values between a softmax and a loss inside the model, such as log-probabilities.
    within = loss_side([nodes[name] for name in is_single & set(unknown)], behind)
    left_out = [
        name for name in free
        if name not in outputs and name not in probabilities
        and not (name in is_single and events)
        and not (name in uses and uses[name].is_harmless)
        and nodes[name] not in within and not any(is_behind(node, nodes[name]) for node in kept)
    ]  # fmt: skip
    plan = _plan(events, seen, outputs, tuple(left_out))
    combined = frozenset().union(plan.combined, *(use.combined for use in uses.values()))
    mixed = any(use.is_mixed for use in uses.values())
    return replace(plan, hidden=tuple(hidden), mixed=mixed, combined=tuple(sorted(combined)))


def _is_settled(form: OutputForm | None) -> bool:
    return form is not None and form.is_settled


def _changed(uses: Mapping[str, Use]) -> str:
    """Return what stands between an output and a softmax, as a sentence; empty if nothing does."""
    found = [
        f"{name}: {', '.join(sorted(use.changes))}" for name, use in uses.items() if use.changes
    ]
    if not found:
        return ""
    return f"Between an output and a softmax or sigmoid stands more ({'; '.join(found)}). "


def _probabilities(nodes: Mapping[str, Node], seen: Mapping[int, LossInput]) -> dict[str, int]:
    """Return the outputs that are results of a sigmoid or softmax, with the index of that call.

    Any loss that follows is a function of these probabilities.
    """
    activations = {
        item.result: index
        for index, item in seen.items()
        if item.is_trained and item.entry.kind in {"softmax", "log-softmax", "sigmoid"}
    }
    return {
        name: activations[origin]
        for name, node in nodes.items()
        for origin in view_chain(node, through=CLAMPS)
        if origin in activations
    }


def _plan(
    events: frozenset[int],
    seen: Mapping[int, LossInput],
    outputs: Mapping[str, OutputForm],
    left_out: tuple[str, ...] = (),
) -> Plan:
    return Plan(
        events, outputs, left_out, weighed=_of_rows(events, seen), combined=_combining(events, seen)
    )


def _of_rows(events: frozenset[int], seen: Mapping[int, LossInput]) -> frozenset[int]:
    """Return the events whose result has one number per row, which may be weighted."""
    return frozenset(index for index in events if not seen[index].is_reduced)


def _combining(events: frozenset[int], seen: Mapping[int, LossInput]) -> tuple[str, ...]:
    nested = sums_of_sums(events, seen)
    combining = {index for index in events if seen[index].entry.combines} | nested
    return tuple(sorted({seen[index].entry.name for index in combining}))


def _live(roots: list[Node], seen: Mapping[int, LossInput]) -> frozenset[int]:
    """Return the calls that compute a loss, only one for the same logits."""
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
    """Return whether to read the logits from the loss rather than from the softmax before it."""
    if loss.entry.outranks_softmax != "same shape":
        return loss.entry.outranks_softmax == "always"
    (ours, _), *_ = loss.parts
    (theirs, _), *_ = softmax.parts
    return ours.shape == theirs.shape
