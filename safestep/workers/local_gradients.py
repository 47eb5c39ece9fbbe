"""A worker's own gradient, copied inside backward before a reduction overwrites it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import Parameter

# torch.dot on a CPU sums in one float32 accumulator: 3e-4 off on 10M numbers, 1e-7 in such pieces.
_CPU_PIECE = 2**16
_SENT_PIECE = 2**24  # entries that are reduced at once: 64 MiB in float32


class LocalGradients:
    """Keep each parameter's gradient as backward leaves it, in one flat buffer.

    A hook copies each gradient after it was accumulated. `DistributedDataParallel` reduces in hooks
    of the accumulator node, which run after those of the parameter. So the copy is the worker's own
    gradient with bucket views, a static graph, unused parameters or any comm hook. It costs one
    pass over the gradients, and memory for one copy of them in float32 or wider. Where several
    backward passes accumulate, each takes one more pass, for the norm of what it added.

    Args:
        parameters: Parameters to follow. Those that need no gradient are left out.
        is_reduced: Called during backward; returns whether this backward will be reduced.

    Attributes:
        parameters: The parameters that are followed.
        is_on: Whether gradients are kept.
        was_reduced: Whether the last backward was reduced.
    """

    def __init__(self, parameters: Iterable[Parameter], is_reduced: Callable[[], bool]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._is_reduced = is_reduced
        self._flat: Tensor | None = None
        self._views: tuple[Tensor, ...] = ()
        self._kept: set[int] = set()
        self._added: list[Tensor] = []  # squared norms of what each parameter got in this backward
        self._backwards: list[Tensor] = []  # the same of each backward, summed
        self._kept_last_step: set[int] = set()  # until the next backward pass
        self.is_on = True
        self.was_reduced = False
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._keep, index))
            for index, parameter in enumerate(self.parameters)
        ]
        _ALIVE.add(self)

    def sums(self, *, share: int, num_shares: int) -> Tensor:
        """Return sums over all parameters. Call it when ``.grad`` holds the mean gradient.

        Args:
            share: This worker's rank. All workers hold the same mean g, so each sums ||g||^2 over
                its share of the parameters.
            num_shares: Number of workers.

        Returns:
            ||g_i||^2, <g_i, g> and this worker's share of ||g||^2. float64, shape ``[3]``.
        """
        own, mixed, mean = [], [], []
        device = self._own().device
        for index, (parameter, view) in enumerate(zip(self.parameters, self._views, strict=True)):
            # A parameter frozen meanwhile may still hold an old gradient.
            grad = parameter.grad if parameter.requires_grad else None
            reduced = torch.zeros_like(view) if grad is None else _dense(grad)
            # All products of a piece while it is in the cache: reading is what they cost.
            for left, right in zip(_pieces(view), _pieces(reduced), strict=True):
                right = right.to(left.dtype)
                own.append(torch.dot(left, left))
                mixed.append(torch.dot(left, right))
                if index % num_shares == share:
                    mean.append(torch.dot(right, right))
        return torch.stack([_total(products, device) for products in (own, mixed, mean)])

    def end_backward(self) -> None:
        """Note the end of a backward pass, of several that accumulate or of the only one."""
        if self.is_on:
            self._backwards.append(_total(self._added, self._device))
            self._added = []

    def added(self) -> Tensor:
        """Return the squared norm of what each backward pass of this step added, in their order.

        Float64; NaN if there was one alone, which added the whole gradient. Shape ``[M]``.
        """
        if len(self._backwards) == 1:
            return torch.full((1,), torch.nan, dtype=torch.float64, device=self._device)
        return torch.stack(self._backwards)

    def unit_pieces(self, norm: Tensor) -> Iterator[Tensor]:
        """Yield the kept gradient divided by its norm, flat and in pieces. They may be changed.

        Args:
            norm: The kept gradient's 2-norm. Shape ``[]``.

        Yields:
            A piece of the unit gradient, none larger than 2^24 entries.
        """
        for piece in self._own().split(_SENT_PIECE):
            yield piece / norm

    def of_step(self) -> dict[Tensor, Tensor | None]:
        """Return the gradient of each parameter in the step that ended last, None without one.

        Returns:
            The gradients; empty if they were not kept, or if a backward pass came since.
        """
        if not self._kept_last_step:
            return {}
        kept = [view if i in self._kept_last_step else None for i, view in enumerate(self._views)]
        return dict(zip(self.parameters, kept, strict=True))

    def clear(self) -> None:
        """End a step; its gradients are kept until the next backward pass."""
        self._kept, self._kept_last_step = set(), self._kept
        self._backwards, self._added = [], []

    def detach(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._kept_last_step = set()
        _ALIVE.discard(self)

    def _keep(self, index: int, parameter: Tensor) -> None:
        self.was_reduced = self._is_reduced()
        if self._kept_last_step:
            self._kept_last_step = set()
        if not self.is_on or parameter.grad is None:
            return
        if self._flat is None:
            self._allocate()
        view, gradient = self._views[index], _dense(parameter.grad)
        if self._backwards or not self.was_reduced:
            is_first = index not in self._kept
            self._added.append(squared_norm(gradient.to(view) if is_first else gradient - view))
        view.copy_(gradient)
        self._kept.add(index)

    @property
    def _device(self) -> torch.device:
        return self.parameters[0].device

    def _own(self) -> Tensor:
        """Return this worker's gradient, flat; zero where this step has none."""
        flat = self._allocate() if self._flat is None else self._flat
        for index, view in enumerate(self._views):
            if index not in self._kept:
                view.zero_()
        return flat

    def _allocate(self) -> Tensor:
        dtype = torch.float32
        for parameter in self.parameters:
            dtype = torch.promote_types(dtype, parameter.dtype)
        sizes = [parameter.numel() for parameter in self.parameters]
        self._flat = torch.empty(sum(sizes), dtype=dtype, device=self._device)
        self._views = tuple(
            view.view(parameter.shape)
            for view, parameter in zip(self._flat.split(sizes), self.parameters, strict=True)
        )
        return self._flat


_ALIVE: WeakSet[LocalGradients] = WeakSet()


def own_gradients(params: Sequence[Tensor]) -> list[Tensor | None]:
    """Return this worker's gradients of the step under way, as they were before the all-reduce.

    Args:
        params: The parameters.

    Returns:
        A gradient for each, None for one without.

    Raises:
        LookupError: If they were not kept; the message says why.
    """
    if not _ALIVE:
        raise LookupError("no WorkerMetrics keeps what the gradients were before the all-reduce")
    of_steps = [each.of_step() for each in _ALIVE]
    if not any(of_steps):
        raise LookupError("WorkerMetrics did not record the backward pass of this step")
    for kept in of_steps:
        if all(param in kept or param.grad is None for param in params):
            return [kept.get(param) for param in params]
    raise LookupError("WorkerMetrics does not keep the gradients of all parameters")


def _dense(grad: Tensor) -> Tensor:
    return grad.detach() if grad.layout == torch.strided else grad.detach().to_dense()


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.flatten().split(_CPU_PIECE if tensor.device.type == "cpu" else tensor.numel())


def _total(products: list[Tensor], device: torch.device) -> Tensor:
    if not products:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(products).double().sum()


def squared_norm(tensor: Tensor) -> Tensor:
    """Return the squared 2-norm of float32 or wider numbers, in float64. Shape ``[]``."""
    return _total([torch.dot(piece, piece) for piece in _pieces(tensor)], tensor.device)
