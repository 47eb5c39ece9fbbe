"""Choose the forward calls to watch if ``training_step`` cannot be run again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer


def modules_to_watch(module: nn.Module, optimizers: Sequence[Optimizer]) -> list[nn.Module]:
    """Return for each optimizer the submodule whose forward calls lead to its logits.

    This is the smallest submodule with the parameters of all optimizers. If only the whole module
    holds them all, as in a GAN, it is the smallest one with the parameters of that optimizer.

    Args:
        module: The module to search.
        optimizers: The optimizers.

    Returns:
        A submodule for each optimizer.
    """
    joint = smallest_submodule(module, optimizers)
    if joint is not module:
        return [joint for _ in optimizers]
    return [smallest_submodule(module, [optimizer]) for optimizer in optimizers]


def smallest_submodule(module: nn.Module, optimizers: Sequence[Optimizer]) -> nn.Module:
    """Return the smallest submodule that holds every use of the optimizers' parameters.

    A head that shares its weight with an embedding uses that parameter outside the embedding.

    Args:
        module: The module to search.
        optimizers: The optimizers.

    Returns:
        The submodule; `module` itself if it holds none of the parameters.

    Example:
        >>> import torch
        >>> pair = torch.nn.ModuleDict({"one": torch.nn.Linear(2, 2), "two": torch.nn.Linear(2, 2)})
        >>> optimizer = torch.optim.SGD(pair["two"].parameters(), lr=0.1)
        >>> smallest_submodule(pair, [optimizer]) is pair["two"]
        True
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    trained = {id(param) for group in groups for param in group["params"]}

    def uses(root: nn.Module) -> set[tuple[int, str]]:
        return {
            (id(owner), name)
            for owner in root.modules()
            for name, param in owner.named_parameters(recurse=False)
            if id(param) in trained
        }

    everywhere = uses(module)
    if not everywhere:
        return module
    return [child for child in module.modules() if uses(child) == everywhere][-1]
