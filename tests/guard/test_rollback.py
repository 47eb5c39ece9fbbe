"""A run that was rolled back goes on as one that was resumed from a checkpoint of then, bitwise."""

import copy
import logging

import pytest
import torch
from helpers.compare import assert_bitwise_equal
from helpers.models import mlp
from helpers.optimizers import SAM, Composite, ScheduleFree, Written, rebind
from helpers.scripts import run_script
from torch import nn

from safestep import SafeStep, read_run
from safestep.report.verdict import write_verdict

STEPS, BACK = 20, 6
AFTER = 2


def adamw(params):
    return torch.optim.AdamW(params, lr=0.05)


OPTIMIZERS = {
    "AdamW": adamw,
    "capturable rate": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.05)),
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=2),
    "SAM": lambda params: SAM(params, lr=0.05),
    "within another": lambda params: Composite(params, lr=0.05),
    "schedule-free": lambda params: ScheduleFree(params, lr=0.05),
    "rebinding": lambda params: Written(params, 0.05, rebind),
}

_NOT_RESUMED = ("SAM", "within another")  # whose state_dict leaves out the optimizers they hold


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 5, generator=generator), torch.randint(3, (6,), generator=generator))
        for _ in range(count)
    ]


def run(make=adamw, **options):
    torch.manual_seed(0)
    model = mlp()
    optimizer = make(model.parameters())
    return model, optimizer, SafeStep(optimizer, model, **options)


def train(model, optimizer, batch, rate=None):
    inputs, labels = batch

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    if rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = rate
    closure()
    optimizer.step(closure if isinstance(optimizer, (torch.optim.LBFGS, SAM)) else None)


def checkpoint(*parts):
    return copy.deepcopy([part.state_dict() for part in parts])


def load(state, *parts):
    for part, own in zip(parts, state, strict=True):
        part.load_state_dict(copy.deepcopy(own))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in _NOT_RESUMED])
@pytest.mark.parametrize("back", [1, BACK])
def test_rolled_back_run_is_one_resumed_from_a_checkpoint_of_that_step_bitwise(name, back):
    make, data = OPTIMIZERS[name], batches(STEPS + 4)
    model, optimizer, guard = run(make, rollback=back, copy=True)
    states = []
    for batch in data[:STEPS]:
        states.append(checkpoint(model, optimizer, guard))
        train(model, optimizer, batch)

    report = guard.roll_back()

    assert report is guard.last
    assert (report.status, report.step, report.scale) == ("rolled back", STEPS - 1, 0.0)
    assert f"those from before step {STEPS - back}" in report.reason
    then = states[STEPS - back]
    assert_bitwise_equal(model.state_dict(), then[0])
    assert_bitwise_equal(optimizer.state_dict(), then[1])
    assert guard.state_dict()["predictor"] == then[2]["predictor"]
    others = run(make)
    load(then, *others)
    for batch in data[STEPS:]:
        train(model, optimizer, batch)
        train(*others[:2], batch)
        assert_bitwise_equal(model.state_dict(), others[0].state_dict())
        assert guard.last.step == others[2].last.step
        assert guard.last.estimator == others[2].last.estimator
        assert guard.last.normalized_step == others[2].last.normalized_step


@pytest.mark.parametrize("name", _NOT_RESUMED)
def test_optimizer_that_holds_others_repeats_its_steps_bitwise(name):
    data = batches(10)
    model, optimizer, guard = run(OPTIMIZERS[name], rollback=4)
    states = []
    for batch in data:
        states.append(checkpoint(model))
        train(model, optimizer, batch)

    guard.roll_back()

    for batch, (then,) in zip(data[6:], states[6:], strict=True):
        assert_bitwise_equal(model.state_dict(), then)
        train(model, optimizer, batch)


def test_keeping_the_past_leaves_training_bitwise_alone():
    data = batches(12)
    model, optimizer, _ = run(rollback=3, rollback_after=2, copy=False)
    plain, plain_optimizer, guard = run()
    guard.detach()

    for batch in data:
        train(model, optimizer, batch)
        train(plain, plain_optimizer, batch)

    assert_bitwise_equal(model.state_dict(), plain.state_dict())
    assert_bitwise_equal(optimizer.state_dict(), plain_optimizer.state_dict())


def test_run_goes_back_by_itself_before_the_first_of_several_interventions_once():
    data = batches(14)
    model, optimizer, guard = run(rollback=BACK, rollback_after=AFTER)
    states, statuses = [], []
    for step, batch in enumerate(data):
        states.append(checkpoint(model, optimizer))
        # A rate that is far too high twice; put back with the optimizer's options.
        train(model, optimizer, batch, rate=1e4 if step in (8, 9) else None)
        statuses.append(guard.last.status)
        if step == 9:
            assert_bitwise_equal(checkpoint(model, optimizer), states[10 - BACK])
            assert "2 steps in a row were clipped or skipped (the last: r = " in guard.last.reason

    assert statuses == 8 * ["ok"] + ["clipped", "rolled back"] + 4 * ["ok"]
    assert guard.last.step == 10 - BACK + 3


def test_trouble_that_a_rollback_does_not_end_does_not_hold_the_run_at_one_place():
    model, optimizer, guard = run(rollback=4, rollback_after=3, max_consecutive_skips=9)
    data = batches(20)
    for batch in data[:5]:
        train(model, optimizer, batch)
    nan = (torch.full((6, 5), torch.nan), data[0][1])

    statuses = []
    for _ in range(8):
        train(model, optimizer, nan)
        statuses.append(guard.last.status)
    with pytest.raises(RuntimeError, match="9 steps in a row were not taken"):
        train(model, optimizer, nan)

    assert statuses == ["skipped", "skipped", "rolled back", *5 * ["skipped"]]


def test_scheduler_and_data_that_the_loop_puts_back_too_repeat_the_run_bitwise():
    data = batches(12)
    model, optimizer, guard = run(rollback=5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    states, after = [], []
    for batch in data:
        states.append(scheduler.state_dict())
        train(model, optimizer, batch)
        scheduler.step()
        after.append(checkpoint(model, optimizer))

    guard.roll_back()
    scheduler.load_state_dict(states[7])
    for batch in data[7:]:
        train(model, optimizer, batch)
        scheduler.step()

    assert_bitwise_equal(checkpoint(model, optimizer), after[-1])


def test_rollback_is_told_in_log_header_events_and_report(tmp_path, caplog):
    model, optimizer, guard = run(rollback=3, rollback_after=2, run_dir=tmp_path)
    with caplog.at_level(logging.INFO, "safestep"), guard:
        for step, batch in enumerate(batches(12)):
            train(model, optimizer, batch, rate=1e4 if step in (6, 7) else None)

    read = read_run(tmp_path)
    assert (read.settings["rollback"], read.settings["rollback_after"]) == (3, 2)
    # 5 * 8 + 8 + 8 + 8 + 8 * 3 + 3 numbers, each with two moments and a step of its own.
    size = 4 * (3 * 91 + 6) + 4 * 16 + 8
    told = f"rollback=3 keeps 3 snapshots of {size / 1e6:.3g} MB, {3 * size / 1e6:.3g} MB in all"
    events = {event["name"]: event["message"] for event in read.events}
    assert events["rollback"] == told
    assert told in caplog.text
    assert events["rolled back"].startswith(
        "after step 7: 2 steps in a row were clipped or skipped"
    )
    assert events["rolled back"].endswith("those from before step 5")
    # Steps 5 to 7 count as they were made the second time.
    assert read["step"].tolist() == list(range(9))
    assert set(read["status"]) == {"ok"}
    assert any("rolled back after step 7: 2 steps" in s for s in write_verdict(read).sentences)


def test_step_that_raised_is_kept_once_and_undone_by_a_call():
    data = batches(8)
    model, optimizer, guard = run(rollback=2)
    for batch in data[:4]:
        train(model, optimizer, batch)
    before = checkpoint(model, optimizer)
    train(model, optimizer, data[4])

    def fail():
        raise OSError("the data are gone")

    for _ in range(3):
        with pytest.raises(OSError, match="the data are gone"):
            optimizer.step(fail)
    guard.roll_back()

    assert "before step 4" in guard.last.reason
    assert_bitwise_equal(checkpoint(optimizer), before[1:])
    assert_bitwise_equal(dict(model.named_parameters()), {
        name: value for name, value in before[0].items() if name in dict(model.named_parameters())
    })  # fmt: skip


def test_count_of_interventions_is_in_the_state_of_a_checkpoint():
    data = batches(8)
    model, optimizer, guard = run(rollback=4, rollback_after=2)
    for step, batch in enumerate(data[:5]):
        train(model, optimizer, batch, rate=1e4 if step == 4 else None)
    assert guard.last.status == "clipped"
    others = run(rollback=4, rollback_after=2)
    load(checkpoint(model, optimizer, guard), *others)

    train(*others[:2], data[5])

    assert others[2].last.status == "rolled back"
    assert "before step 5" in others[2].last.reason  # what is kept is not in a checkpoint


def test_buffer_that_the_forward_pass_rebinds_goes_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(5, 3)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, inputs):
            self.seen = self.seen + 1
            return self.head(inputs)

    model = Counting()
    optimizer = adamw(model.parameters())
    guard = SafeStep(optimizer, model, rollback=2)
    for batch in batches(5):
        train(model, optimizer, batch)

    guard.roll_back()

    assert model.seen == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollback": 0}, "expected `rollback` to be a positive integer or None, got 0"),
        ({"rollback": True}, "expected `rollback` to be a positive integer or None, got True"),
        ({"rollback": 2.5}, "expected `rollback` to be a positive integer or None, got 2.5"),
        ({"rollback": 3, "rollback_after": -1}, "expected `rollback_after` to be a positive"),
        ({"rollback": 3, "rollback_after": 4}, "at most `rollback`, got 4 and 3"),
        ({"rollback_after": 2}, "at most `rollback`, got 2 and None"),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_call_at_the_wrong_moment_says_so():
    model, optimizer, guard = run()
    train(model, optimizer, batches(1)[0])
    with pytest.raises(RuntimeError, match="got `rollback` of None"):
        guard.roll_back()
    model, optimizer, guard = run(rollback=3)
    with pytest.raises(RuntimeError, match="got none: no step was made"):
        guard.roll_back()

    def closure():
        return guard.roll_back()

    train(model, optimizer, batches(1)[0])
    with pytest.raises(RuntimeError, match="a call within a step"):
        optimizer.step(closure)


def test_memory_that_is_not_there_turns_it_off_and_training_goes_on(monkeypatch):
    model, optimizer, guard = run(rollback=3)
    data = batches(4)
    train(model, optimizer, data[0])

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", full)  # by which small tensors are copied
        patch.setattr(guard._undo, "take", guard._undo.release)
        with pytest.warns(UserWarning, match="no step can be rolled back: .*out of memory"):
            train(model, optimizer, data[1])
    train(model, optimizer, data[2])

    assert guard.last.status == "ok"
    with pytest.raises(RuntimeError, match="got CUDA out of memory"):
        guard.roll_back()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    output = tmp_path_factory.mktemp("rolled_back")
    run_script("rolled_back.py", output)
    return [torch.load(output / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_ranks_go_back_together_and_on_as_from_a_checkpoint_bitwise(ranks, kind):
    for found in ranks:
        seen = found[kind]
        assert seen["statuses"] == ranks[0][kind]["statuses"]
        assert seen["statuses"][-3:] == ["rolled back", "ok", "ok"]
        assert_bitwise_equal(seen["rolled back"], seen["then"])
        assert_bitwise_equal(seen["rolled back, then on"], seen["resumed, then on"])
        assert_bitwise_equal(seen["called"], seen["then"])


def test_one_rank_that_is_due_takes_all_back(ranks):
    """Its own report says so; the others' do not, as where a rank could not scale a step."""
    for found in ranks:
        assert found["one is due"]["status"] == "rolled back"
        assert_bitwise_equal(found["one is due"]["after"], found["one is due"]["then"])
