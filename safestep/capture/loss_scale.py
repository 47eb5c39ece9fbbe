"""Find the factor that a GradScaler multiplied the loss by, while it makes a step."""

import sys

from torch.amp import GradScaler

_STEP = GradScaler.step.__code__


def running_loss_scale(*, is_made: bool) -> float:
    """Return what the loss's gradient was multiplied by and the step's gradient is divided by.

    Args:
        is_made: Whether the optimizer has made its step; a fused one divides in it.

    Returns:
        The scale of the GradScaler whose ``step`` is running; 1.0 if there is none, or if neither
        of the two is divided yet.
    """
    frame = sys._getframe()
    while frame is not None and frame.f_code is not _STEP:
        frame = frame.f_back
    if frame is None:
        return 1.0
    scaler, optimizer = frame.f_locals["self"], frame.f_locals["optimizer"]
    is_divided = is_made or getattr(optimizer, "grad_scale", None) is None
    return float(scaler.get_scale()) if is_divided else 1.0
