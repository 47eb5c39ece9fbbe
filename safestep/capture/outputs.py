"""Walk through what a model or a training step returned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def named_tensors(output: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Walk through tensors, mappings, sequences and dataclasses, yielding names and tensors.

    Args:
        output: What a model returned.
        name: What to call it.

    Yields:
        A name such as ``output.logits`` or ``output[0]``, and the tensor.
    """
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from named_tensors(value, f"{name}.{key}")
    elif isinstance(output, (list, tuple)):
        for index, value in enumerate(output):
            yield from named_tensors(value, f"{name}[{index}]")
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from named_tensors(getattr(output, field.name), f"{name}.{field.name}")


def traced_loss(output: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors with a gradient of what a training step returned.

    Args:
        output: A loss, or a mapping with one in "loss".

    Returns:
        Names and tensors.
    """
    loss = output["loss"] if isinstance(output, Mapping) and "loss" in output else output
    return [(name, each) for name, each in named_tensors(loss) if each.grad_fn is not None]
