"""What an interrupt leaves half done is undone, from the inside out."""

from contextlib import contextmanager

import pytest
import torch
from torch.autograd import forward_ad

from safestep.capture.unwinding import FunctionMode, Surroundings, undone


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


class Raised:
    """A context manager whose exit is interrupted before it begins, as Python allows."""

    def __init__(self, within):
        self.within = within

    def __enter__(self):
        self.within.__enter__()

    def __exit__(self, *_):
        raise KeyboardInterrupt


def test_an_exit_that_was_skipped_does_not_run_after_everything_was_restored():
    before = Surroundings()
    with pytest.raises(KeyboardInterrupt) as caught, Raised(contextmanager(without_graph)()):
        pass
    assert not torch.is_grad_enabled()

    before.restore(caught.value)

    torch.set_grad_enabled(False)
    del caught  # frees the traceback, and what it still held
    assert not torch.is_grad_enabled()
    torch.set_grad_enabled(True)


def without_graph():
    with torch.no_grad():
        yield


def test_an_interrupt_shows_behind_the_error_that_took_its_place_and_one_before_does_not():
    def replaced():
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("in a finally")

    with pytest.raises(RuntimeError) as caught:
        replaced()
    assert isinstance(Surroundings().interrupt(caught.value), KeyboardInterrupt)

    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        within_a_handler = Surroundings()
        with pytest.raises(ValueError, match="later") as caught:
            raise ValueError("later")  # noqa: B904
        assert within_a_handler.interrupt(caught.value) is None


def test_a_mode_that_an_interrupt_took_off_leaves_no_error_and_no_mode():
    with FunctionMode():
        torch._C._pop_torch_function_stack()  # as torch does while it calls a mode
    assert torch._C._len_torch_function_stack() == 0
