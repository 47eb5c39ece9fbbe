"""Tell which stage of a pipeline a module is."""

from __future__ import annotations

import gc
import sys
from typing import Any

from torch import nn


def pipeline_stages(module: nn.Module) -> tuple[int, ...]:
    """Return which stages of torch's pipeline a module holds, or is a part of.

    Nothing on a module tells that it is a stage, so the stages are looked for in memory, once, and
    only where ``torch.distributed.pipelining`` was imported.

    Args:
        module: The module.

    Returns:
        The numbers of the stages in their order, none where there is no pipeline.
    """
    pipelining = sys.modules.get("torch.distributed.pipelining.stage")
    if pipelining is None:
        return ()
    parts, base = set(module.modules()), pipelining._PipelineStageBase
    # By type: to ask objects themselves for their class may load modules.
    stages: list[Any] = [found for found in gc.get_objects() if base in type(found).__mro__]
    return tuple(sorted({s.stage_index for s in stages if parts & set(s.submod.modules())}))
