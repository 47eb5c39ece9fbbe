"""Error of r of each estimator, by size of the update and by precision.

Run: python tests/benchmarks/bench_estimators.py. Every entry is r / r(float64 JVP) - 1 for the
update that Adam made in its 20th step, times a factor. What the docstrings of
safestep.measure.estimators say about scope, and the distance of a finite difference, come from it.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from safestep import logits_jvp
from safestep.capture.call import Call
from safestep.capture.random_state import CallConditions
from safestep.measure.estimators import LogitTangent, difference, jvp, secant
from safestep.measure.perturb import moved_back

FACTORS = (1e-4, 1e-2, 1.0, 1e2, 1e4)


def transformer() -> nn.Module:
    layers = [
        nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True) for _ in range(2)
    ]
    return nn.Sequential(
        nn.Unflatten(1, (8, 8)), nn.Linear(8, 32), *layers, nn.Flatten(), nn.Linear(256, 10)
    )


def multilayer() -> nn.Module:
    hidden = [nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU()]
    return nn.Sequential(*hidden, *copy.deepcopy(hidden), nn.Linear(64, 10))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def trained(model: nn.Module, inputs: Tensor, target: Tensor) -> list[Tensor]:
    """Train for 20 steps, take the last one back and return it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    start: list[Tensor] = []
    for _ in range(20):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), target).backward()
        start = [param.detach().clone() for param in model.parameters()]
        optimizer.step()
    with torch.no_grad():
        update = list(torch._foreach_sub(list(model.parameters()), start))
        torch._foreach_copy_(list(model.parameters()), start)
    return update


def reference(model: nn.Module, update: list[Tensor], inputs: Tensor) -> float:
    names = [name for name, _ in model.named_parameters()]
    tangent = {name: part.double() for name, part in zip(names, update, strict=True)}
    return spread(logits_jvp(copy.deepcopy(model).double(), tangent, inputs.double())[1])


def spread(tangent: Tensor) -> float:
    return float((tangent.amax(-1) - tangent.amin(-1)).max())


def errors(model: nn.Module, update: list[Tensor], inputs: Tensor, dtype: torch.dtype) -> list[str]:
    """Return the relative errors of the three estimators, as text."""
    exact = reference(model, update, inputs)
    call = Call.of(model, (inputs,), {}, CallConditions(model))
    call.autocast = () if dtype is torch.float32 else (("cpu", dtype),)
    params = list(model.parameters())
    start = list(torch._foreach_add([param.detach() for param in params], update))

    def error(rows: object) -> str:
        (row,) = rows  # pyright: ignore[reportGeneralTypeIssues]
        assert isinstance(row, LogitTangent)
        return f"{spread(row.tangent) / exact - 1:+.0e}"

    found = [error(each([call], model, params, update, identity)) for each in (jvp, difference)]
    with moved_back(params, start):  # the other way round: to where the update leads
        found.append(error(secant([call], model, params, start, identity)))
    return found


def identity(output: Tensor) -> Tensor:
    return output


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(256, 64, generator=generator)
    target = (inputs[:, :10] + 0.1 * inputs[:, 10:20]).argmax(-1)
    print("| model | precision | factor | r | jvp | difference | secant |")
    print("|---|---|---|---|---|---|---|")
    for make_model in (transformer, multilayer, convolutional):
        torch.manual_seed(0)
        model = make_model()
        update = trained(model, inputs, target)
        for dtype in (torch.float32, torch.bfloat16):
            for factor in FACTORS:
                scaled = [factor * part for part in update]
                r = reference(model, scaled, inputs) / torch.pi
                cells = " | ".join(errors(model, scaled, inputs, dtype))
                name = str(dtype).removeprefix("torch.")
                print(f"| {make_model.__name__} | {name} | {factor:g} | {r:.1e} | {cells} |")


if __name__ == "__main__":
    main()
