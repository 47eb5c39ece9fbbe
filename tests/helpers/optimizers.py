"""Optimizers as people write them: they rebind data, hold others, or hold the step itself."""

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer


class Written(Optimizer):
    """Gradient descent whose way of writing a parameter is the argument."""

    def __init__(self, params, lr, write):
        super().__init__(params, {"lr": lr})
        self.write = write

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.write(param, param - group["lr"] * param.grad)


def rebind(param, new):
    param.data = new


def rebind_transposed(param, new):
    param.data = new.t().contiguous().t()


def set_storage(param, new):
    param.set_(new)


def swap(param, new):
    torch.utils.swap_tensors(param, twin := nn.Parameter(new))
    param.grad, twin.grad = twin.grad, None


WRITES = {
    "in place": lambda param, new: param.copy_(new),
    "data": rebind,
    "transposed": rebind_transposed,
    "set_": set_storage,
    "swap_tensors": swap,
}


class SAM(Optimizer):
    """Sharpness-aware minimisation around a base optimizer; puts old weights back by rebinding."""

    def __init__(self, params, base=SGD, rho=0.05, **options):
        super().__init__(params, options)
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups, self.rho = self.base_optimizer.param_groups, rho

    @torch.no_grad()
    def first_step(self):
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for param in params:
            self.state[param]["old"] = param.data.clone()
            param.add_(param.grad * self.rho / norm)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for param in group["params"]:
                param.data = self.state[param]["old"]
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure):
        self.first_step()
        with torch.enable_grad():
            loss = closure()
        self.second_step()
        return loss


class Lookahead(Optimizer):
    """Slow weights that the fast ones return to; a list, an int and an optimizer as attributes."""

    def __init__(self, base, k=3, alpha=0.5):
        self.base, self.k, self.alpha, self.count = base, k, alpha, 0
        params = [p for group in base.param_groups for p in group["params"]]
        super().__init__(params, {"lr": base.param_groups[0]["lr"]})
        self.param_groups = base.param_groups
        self.slow = [param.detach().clone() for param in params]

    @torch.no_grad()
    def step(self, closure=None):
        self.base.step()
        self.count += 1
        if self.count % self.k == 0:
            params = [p for group in self.param_groups for p in group["params"]]
            for slow, param in zip(self.slow, params, strict=True):
                slow.lerp_(param, self.alpha)
                param.copy_(slow)


class Composite(Optimizer):
    """One optimizer for matrices and one for vectors, in a list."""

    def __init__(self, params, lr):
        params = list(params)
        self.parts = [
            SGD([p for p in params if p.ndim == 2], lr=lr, momentum=0.9),
            Adam([p for p in params if p.ndim != 2], lr=lr),
        ]
        super().__init__(params, {"lr": lr})
        self.param_groups = [g for part in self.parts for g in part.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        for part in self.parts:
            part.step()


class ScheduleFree(Optimizer):
    """SGD without a schedule: parameters are y = 0.1 z + 0.9 x, the state holds z."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            share = 1 / (group["k"] + 1)
            for param in group["params"]:
                state = self.state[param]
                if "z" not in state:
                    state["z"] = param.detach().clone()
                param.lerp_(state["z"], share)
                param.add_(param.grad, alpha=group["lr"] * (0.9 * (1 - share) - 1))
                state["z"].sub_(param.grad, alpha=group["lr"])
            group["k"] += 1


class ScheduleFreeWrapper:
    """The same around any optimizer, of which it is none: z in its state, x and y by turns."""

    def __init__(self, base):
        self.base = base

    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)

    def zero_grad(self):
        self.base.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for param in group["params"]:
                if "z" not in self.state[param]:
                    self.state[param]["z"] = param.detach().clone()
                z = self.state[param]["z"]
                x = (param - 0.1 * z) / 0.9
                param.copy_(z)
                z.copy_(x)
        self.base.step()
        for group in self.param_groups:
            for param in group["params"]:
                z, x = param.detach().clone(), self.state[param]["z"].clone()
                x.lerp_(z, 1 / group["k"])
                self.state[param]["z"].copy_(z)
                param.copy_(0.1 * z + 0.9 * x)


class Hookless(Optimizer):
    """Lookahead as some packages write it: never initialised, so that no hook of it fires."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.state, self.defaults, self.count = {}, optimizer.defaults, 0
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] = {"slow": param.detach().clone()}

    def zero_grad(self):
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        self.count += 1
        if self.count % 3 == 0:
            for param, state in self.state.items():
                state["slow"].lerp_(param, 0.5)
                param.copy_(state["slow"])


class Velocity(Optimizer):
    """Momentum whose state is the step itself, learning rate included."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                velocity = self.state[param].setdefault("velocity", torch.zeros_like(param))
                velocity.mul_(0.9).sub_(param.grad, alpha=group["lr"])
                param.add_(velocity)


class Summing(Optimizer):
    """Sums up lr * gradient, as Prodigy and D-Adaptation do; its gradients decay in place."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "sum": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.grad.add_(param, alpha=0.1)
                total = self.state[param].setdefault("s", torch.zeros_like(param))
                average = self.state[param].setdefault("average", torch.zeros_like(param))
                total.add_(param.grad, alpha=group["lr"])
                average.lerp_(param.grad, 0.1)
                group["sum"] += group["lr"] * float(param.grad.abs().sum())
                param.sub_(average, alpha=group["lr"])


class Quantized(torch.Tensor):
    """Numbers as int8 with one scale, in a tensor that has no memory of its own."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __repr__(self):
        return "Quantized"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            target, source = args
            target.scale.copy_(source.abs().amax() / 127)
            target.codes.copy_((source / target.scale).round())
            return target
        raise NotImplementedError(f"{func}")

    def numbers(self):
        return self.codes * self.scale


class Flattened(Quantized):
    """The same, with the protocol by which torch.compile takes such a tensor apart."""

    def __tensor_flatten__(self):
        return ["codes", "scale"], None


class Sealed(Quantized):
    """The same, but nobody finds its numbers."""

    def __init__(self, codes, scale):
        self.inside = lambda: (codes, scale)

    codes = property(lambda self: self.inside()[0])
    scale = property(lambda self: self.inside()[1])


class QuantizedMomentum(Optimizer):
    """Momentum in a quantized tensor."""

    def __init__(self, params, lr, kind=Quantized):
        super().__init__(params, {"lr": lr})
        self.kind = kind

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    codes = torch.zeros(param.shape, dtype=torch.int8)
                    state["momentum"] = self.kind(codes, torch.zeros(()))
                momentum = state["momentum"].numbers() * 0.9 + param.grad
                state["momentum"].copy_(momentum)
                param.sub_(momentum, alpha=group["lr"])
