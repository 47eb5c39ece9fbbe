"""Warnings point at the line of the user's program, not at one of the package or of torch."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from safestep import SafeStep, read_run
from safestep.capture.recorder import MAX_RECORDED_CALLS
from safestep.runlog.writer import RunLog


class NoSecondRun(nn.Module):
    """A network that cannot be run again to measure."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, inputs):
        if not torch.is_grad_enabled():
            raise ValueError("not without gradients")
        return self.linear(inputs)


@contextlib.contextmanager
def warns_here(match):
    with pytest.warns(UserWarning, match=match) as found:
        yield
    assert [warning.filename for warning in found] == [__file__]


def test_a_step_that_is_not_measured_is_a_warning_at_the_step():
    model = NoSecondRun()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, model)
    cross_entropy(model(torch.ones(2, 4)), torch.tensor([0, 1])).backward()

    with warns_here("not measured and left alone: ValueError: not without gradients"):
        optimizer.step()

    guard.detach()


def test_backward_passes_without_a_step_are_a_warning_at_the_last():
    model = nn.Linear(4, 3)
    guard = SafeStep(torch.optim.SGD(model.parameters(), lr=0.1), model)

    with warns_here("never stepped"):
        for _ in range(MAX_RECORDED_CALLS + 1):
            cross_entropy(model(torch.ones(2, 4)), torch.tensor([0, 1])).backward()

    guard.detach()


def test_a_torn_line_is_a_warning_where_the_run_is_read(tmp_path):
    with RunLog(tmp_path, {}) as log:
        log.write("event", {"step": 0, "name": "start", "message": ""})
    with log.path.open("a") as file:
        file.write('{"kind": "st')

    with warns_here("skipped the torn last line"):
        read_run(tmp_path)


def test_a_full_disk_is_a_warning_where_the_record_was_made(tmp_path):
    """A limit on file sizes stands for the full disk: the system refuses the write."""
    resource = pytest.importorskip("resource")
    log = RunLog(tmp_path, {})
    log.write("event", {"step": 0, "name": "start", "message": ""})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size, hard))
    try:
        with warns_here("no more records"):
            log.write("event", {"step": 1, "name": "start", "message": ""})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.close()
