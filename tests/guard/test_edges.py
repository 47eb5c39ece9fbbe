"""Nothing that fails in the guard reaches training, and an interrupt leaves no half-made step."""

import contextlib
import random
import signal
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.functional import cross_entropy

import safestep
from safestep import SafeStep

PACKAGE = str(Path(safestep.__file__).parent)
# The edge itself, and the functions that it calls once something has failed.
EDGE = {"call", "__call__", "is_passed_on", "_not_begun", "_not_ended", "_not_recorded", "note"}
# Before its first line nothing of ours can run: without copies, a scaled learning rate stays then
# until the next step begins.
EDGE |= {"_after_step"}
EDGE |= {"<genexpr>"}  # Python itself drops what is raised while one is closed


class Run:
    """A model with dropout, buffers and an attribute that forward changes, under Adam."""

    def __init__(self, is_guarded=True, lr=1e-2, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4)
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=lr)
        self.guard = SafeStep(self.optimizer, self.model, **options) if is_guarded else None
        self.index = 0

    def step(self):
        generator = torch.Generator().manual_seed(self.index)
        self.index += 1
        inputs = torch.randn(8, 6, generator=generator)
        labels = torch.randint(4, (8,), generator=generator)
        torch.manual_seed(self.index)
        self.optimizer.zero_grad()
        cross_entropy(self.model(inputs), labels).backward()
        self.optimizer.step()

    def numbers(self):
        state = self.optimizer.state_dict()["state"]
        return [
            tensor.clone()
            for tensor in (
                *self.model.state_dict().values(),
                *(value for each in state.values() for value in each.values()),
            )
        ]


def are_equal(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


def is_clean(run):
    return (
        torch.is_grad_enabled()
        and forward_ad._current_level == -1
        and torch._C._len_torch_function_stack() == 0
        and all(len(vars(child)) > 5 for child in run.model.modules())
    )


def functions_of(work):
    """Return the code of every function of the package that `work` calls."""
    found = {}

    def look(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_name not in EDGE:
            found[code] = None

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return list(found)


def raising(code, error, work):
    """Run `work`; the first time that it calls a function, that function raises."""

    def look(frame, event, _):
        if event == "call" and frame.f_code is code:
            sys.setprofile(None)
            raise error

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)


CASES = [
    pytest.param({"estimator": "jvp", "lr": 1.0}, 2, id="clipped"),
    pytest.param({"estimator": "jvp", "lr": 1.0, "copy": False}, 2, id="computed ahead"),
    pytest.param({"estimator": "difference"}, 2, id="difference"),
    pytest.param({"lr": 1e-4}, 20, id="predicted"),
]


def prepared(options, steps):
    run = Run(**options)
    for _ in range(steps):
        run.step()
    return run


@pytest.mark.parametrize("every", [25, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("options", "steps"), CASES)
def test_an_error_in_any_function_of_ours_stays_out_of_training(options, steps, every):
    warnings.simplefilter("ignore")
    example = prepared(options, steps)
    before = example.numbers()
    codes = functions_of(example.step)
    assert len(codes) > 40
    for code in codes[::every]:
        run = prepared(options, steps)
        raising(code, RuntimeError("injected"), run.step)
        assert is_clean(run), code
        ours = run.numbers()
        assert all(bool(tensor.isfinite().all()) for tensor in ours), code
        assert not are_equal(ours, before) or run.guard.last.status == "skipped", code
        run.step()
        assert is_clean(run), code
        assert run.guard.last.status in ("ok", "clipped"), (code, run.guard.last)


@pytest.mark.parametrize("every", [25, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("options", "steps"), CASES)
def test_an_interrupt_in_any_function_of_ours_undoes_the_step(options, steps, every):
    warnings.simplefilter("ignore")
    example = prepared(options, steps)
    before = example.numbers()
    codes = functions_of(example.step)
    after = example.numbers()
    for code in codes[::every]:
        run = prepared(options, steps)
        with pytest.raises(KeyboardInterrupt):
            raising(code, KeyboardInterrupt(), run.step)
        assert is_clean(run), code
        ours = run.numbers()
        is_before = are_equal(parameters(ours), parameters(before))
        assert is_before or are_equal(parameters(ours), parameters(after)), code
        assert run.guard.state_dict()["step"] == steps + (not is_before), code


class Lines:
    """Count the lines that run within the package's functions; raise at one of them."""

    def __init__(self, stop_at=None):
        self.stop_at, self.count, self.place = stop_at, 0, None

    def of(self, work):
        sys.settrace(self._enter)
        try:
            work()
        finally:
            sys.settrace(None)
        return self.count

    def _enter(self, frame, event, _):
        outer = frame
        while outer is not None:
            code = outer.f_code
            if code.co_filename.startswith(PACKAGE) and code.co_name not in EDGE:
                return self._line
            outer = outer.f_back
        return None

    def _line(self, frame, event, _):
        if event == "line":
            self.count += 1
            if self.count == self.stop_at:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line


MOMENTS = [
    *CASES,
    pytest.param({"lr": 1e-4, "copy": False}, 20, id="predicted ahead"),
    pytest.param({"lr": 1.0, "rollback": 3, "rollback_after": 3}, 2, id="rolled back"),
]


@pytest.mark.parametrize("count", [5, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("options", "steps"), MOMENTS)
def test_an_interrupt_at_any_line_leaves_a_whole_step_or_none(options, steps, count):
    """Of ours, or of what ours calls: torch, the model, context managers of Python."""
    warnings.simplefilter("ignore")
    prepared(options, steps).step()  # what runs once a process
    example = prepared(options, steps)
    before = example.numbers()
    total = Lines().of(example.step)
    whole = [before, example.numbers()]
    if "rollback_after" in options:  # an interrupt may come after the step and before the rollback
        taken = prepared({**options, "rollback_after": None}, steps)
        taken.step()
        whole.append(taken.numbers())
    for moment in range(total // count // 2, total, total // count):
        run, lines = prepared(options, steps), Lines(moment)
        with contextlib.suppress(KeyboardInterrupt):
            lines.of(run.step)
        assert lines.place is not None or moment > 0.9 * total  # some lines run only at times
        assert is_clean(run), lines.place
        ours = parameters(run.numbers())
        assert any(are_equal(ours, parameters(each)) for each in whole), lines.place
        run.step()
        assert is_clean(run), lines.place


def parameters(numbers):
    """Return what an optimizer step changes: all but BatchNorm's three buffers."""
    return [*numbers[:4], *numbers[7:]]


@pytest.mark.parametrize("options", [{"estimator": "jvp", "lr": 1.0}, {"estimator": "difference"}])
def test_a_signal_at_a_random_moment_leaves_no_half_made_step_in_99_of_100(options):
    """Python drops an interrupt while it closes a generator, and a hook has an entry."""
    warnings.simplefilter("ignore")
    rng, is_armed = random.Random(0), False
    run = prepared(options, 2)
    ours = left_open = 0

    def interrupt(*_):
        nonlocal is_armed
        if is_armed:
            is_armed = False
            raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(300):
            before, count = run.numbers(), run.guard.state_dict()["step"]
            error = None
            try:
                is_armed = True
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 1.2e-2))
                run.step()
            except (KeyboardInterrupt, RuntimeError) as raised:
                error = raised
            was_struck, is_armed = not is_armed, False
            signal.setitimer(signal.ITIMER_REAL, 0)
            is_ours = isinstance(error, KeyboardInterrupt) and was_in(error.__traceback__)
            ours += is_ours
            is_half = is_ours and run.guard.state_dict()["step"] == count
            is_half = is_half and not are_equal(parameters(run.numbers()), parameters(before))
            is_open = was_struck and (not is_clean(run) or is_half)
            left_open += is_open
            if is_open or (error is not None and not is_ours):  # torch leaves things open as well
                leave_everything()
                run = prepared(options, 2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        leave_everything()
    assert ours > 20
    assert left_open <= 3  # of 300; measured: 14 of 5,299


def leave_everything():
    """Put back what an interrupt left open, so that the tests that follow do not see it."""
    torch.set_grad_enabled(True)
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    if forward_ad._current_level >= 0:
        with contextlib.suppress(RuntimeError):
            torch._C._exit_dual_level(level=0)
        forward_ad._current_level = -1


def was_in(trace: types.TracebackType | None) -> bool:
    """Return whether an error passed through code of the package."""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.startswith(PACKAGE):
            return True
        trace = trace.tb_next
    return False


@pytest.mark.parametrize("estimator", ["auto", "jvp"])
@pytest.mark.filterwarnings("ignore:SafeStep")
def test_an_empty_batch_is_unmeasured_and_an_empty_head_is_left_out(estimator):
    trunk, heads = nn.Linear(4, 8), nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 5)])
    model = nn.ModuleList([trunk, heads])
    model.forward = lambda x, rows: (heads[0](trunk(x)), heads[1](trunk(x)[rows]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    guard = SafeStep(optimizer, model, estimator=estimator)
    inputs, labels = torch.randn(6, 4), torch.randint(3, (6,))
    seen = []
    for count, rows in ((6, [0, 2]), (6, []), (0, []), (6, [1])):
        rows = torch.tensor(rows, dtype=torch.long)
        optimizer.zero_grad()
        one, two = model(inputs[:count], rows)
        loss = cross_entropy(one, labels[:count], reduction="sum") + two.logsumexp(-1).sum()
        loss.backward()
        optimizer.step()
        seen.append(guard.last.status)
    assert seen == ["ok", "ok", "unmeasured", "ok"]


@pytest.mark.filterwarnings("ignore:SafeStep")
def test_what_has_no_logits_is_tried_ever_more_rarely_and_at_once_for_another_loss():
    model = nn.Linear(4, 5)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(None))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    guard = SafeStep(optimizer, model)

    def step(loss):
        optimizer.zero_grad()
        before = len(calls)
        loss(model(torch.randn(8, 4))).backward()
        optimizer.step()
        return len(calls) - before - 1

    again = [step(lambda output: (output - 1).square().sum()) for _ in range(120)]
    assert all(again[:8])
    assert sum(map(bool, again[8:])) == 1
    assert guard.last.status == "unmeasured"
    labels = torch.randint(5, (8,))
    assert step(lambda output: cross_entropy(output, labels)) > 0
    assert guard.last.status == "ok"
