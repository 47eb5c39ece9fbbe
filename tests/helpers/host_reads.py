"""Count what the host reads from tensors, as it would have to wait for if they lay on a device."""

import sys
from collections import Counter

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Operators whose result, or its shape, is known on the host only when the device is done.
_WAITS = {
    aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.unique_dim,
    aten._unique2, aten.is_nonzero, aten.repeat_interleave,
}  # fmt: skip
# Those that a tensor in main memory answers without an operator.
_COPIES = {Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__array__}


class HostReads(TorchDispatchMode):
    """Count reads within the context, in `reads` by where they are.

    Tensors say that they are not on the CPU, so that code takes the way of a device.
    """

    def __init__(self):
        super().__init__()
        self.reads = Counter()
        self._functions = _Functions(self.reads)

    def __enter__(self):
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        if packet in _WAITS or _puts_on_host(packet, args):
            self.reads[_place()] += 1
        return func(*args, **(kwargs or {}))


class Collectives(TorchDispatchMode):
    """Count within the context what ranks ask each other, in `asked` by name."""

    def __init__(self):
        super().__init__()
        self.asked = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.asked[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, reads):
        self._reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == Tensor.is_cpu.__get__:
            return False
        if func in _COPIES or (func is Tensor.to and "cpu" in args[1:]):
            self._reads[_place()] += 1
        return func(*args, **(kwargs or {}))


def _puts_on_host(packet, args):
    """Return whether a mask picks entries: their number is not known before."""
    if packet not in (aten.index, aten.index_put_):
        return False
    return any(index is not None and index.dtype is torch.bool for index in args[1])


def _place():
    """Return the file and function of the package that read."""
    frame = sys._getframe(1)
    while frame is not None:
        _, is_ours, path = frame.f_code.co_filename.partition("/safestep/")
        if is_ours:
            return f"{path}: {frame.f_code.co_name}"
        frame = frame.f_back
    return "the training loop"
