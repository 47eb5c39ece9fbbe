"""What an interrupt leaves half done is undone, from the inside out."""

import pytest
import torch
from torch.autograd import forward_ad

from safestep.capture.unwinding import Surroundings, undone


def test_a_level_that_torch_left_but_still_counts_does_not_keep_the_rest_from_being_restored():
    """An interrupt came between the two lines of ``forward_ad.exit_dual_level``."""
    before = Surroundings()
    forward_ad.enter_dual_level()
    torch._C._exit_dual_level(level=0)
    torch._C._set_grad_enabled(False)

    before.restore()

    assert forward_ad._current_level == -1
    assert torch.is_grad_enabled()
    with forward_ad.dual_level():  # a new level can be entered
        assert forward_ad._current_level == 0


def test_an_undo_that_is_interrupted_is_made_up_for_before_those_around_it():
    order = []
    tries = iter([KeyboardInterrupt, None])

    def inner():
        if error := next(tries):
            raise error
        order.append("inner")

    with pytest.raises(KeyboardInterrupt), undone(lambda: order.append("outer")), undone(inner):
        pass

    assert order == ["inner", "outer"]
