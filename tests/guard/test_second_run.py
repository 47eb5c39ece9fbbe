"""A step that went wrong is run again: data and rate repeat their result, a fault does not."""

import copy

import pytest
import torch
from helpers.compare import assert_bitwise_equal
from helpers.models import mlp
from helpers.scripts import run_script
from torch import nn
from torch.nn import functional

from safestep import SafeStep
from safestep.guard.second_run import SecondRun

SAME = (
    "run again, its batch gives the same result bit for bit: the data or the rate is the cause, "
    "not this machine"
)
OTHER = (
    "run again, its batch gives another result: this machine, or state outside the model, is the "
    "cause"
)

# The audit of the gradient sees the planted fault as well.
pytestmark = pytest.mark.filterwarnings("ignore:SafeStep. gradient does not match the loss")

CALLS = {"left": 0, "factor": 1.0}  # outside every module: a re-run does not put it back


class Flaky(nn.Module):
    """Multiplies its input by a planted factor as often as is left."""

    def forward(self, inputs):
        CALLS["left"] -= 1
        return inputs * CALLS["factor"] if CALLS["left"] >= 0 else inputs


class LanguageModel(nn.Module):
    """One weight, logits for each token; rows that are long have a large r."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, tokens, scale=1.0):
        return self.head(tokens) * scale


@pytest.fixture(autouse=True)
def sound():
    CALLS.update(left=0, factor=1.0)


def run(model=None, rate=0.05, **options):
    torch.manual_seed(0)
    model = nn.Sequential(mlp(dropout=0.2), Flaky()) if model is None else model
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    return model, optimizer, SafeStep(optimizer, model, **options)


def train(model, optimizer, inputs, rate=0.05, **kwargs):
    optimizer.param_groups[0]["lr"] = rate
    optimizer.zero_grad()
    logits = model(inputs, **kwargs).flatten(0, -2)
    loss = nn.functional.cross_entropy(logits, torch.arange(len(logits)) % 3)
    loss.backward()
    optimizer.step()
    return loss.detach()


def batch(seed=1, rows=6):
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("estimator", ["auto", "jvp", "difference"])
@pytest.mark.parametrize("copy", [True, False], ids=["copies", "ahead"])
def test_rate_and_data_repeat_their_result_bit_for_bit(estimator, copy):
    """With dropout and BatchNorm, whose state a second run must find as the first did."""
    model, optimizer, guard = run(estimator=estimator, copy=copy)
    train(model, optimizer, batch())
    assert (guard.last.status, guard.last.reason) == ("ok", None)

    train(model, optimizer, batch(2), rate=1e4)

    assert guard.last.status == "clipped"
    row = guard.last.bottleneck
    assert guard.last.reason == f"row {row} (example {row}) set the radius; {SAME}"
    train(model, optimizer, batch(3).fill_(torch.nan))
    assert guard.last.status == "skipped"
    assert guard.last.second_run == "same"
    assert guard.last.reason == f"the gradient is not finite: 0.0.weight; {SAME}"


@pytest.mark.parametrize(("factor", "status"), [(1e5, "clipped"), (torch.nan, "skipped")], ids=str)
@pytest.mark.parametrize("estimator", ["auto", "jvp"])
def test_planted_fault_gives_another_result_and_is_called_this_machine(factor, status, estimator):
    model, optimizer, guard = run(estimator=estimator)
    train(model, optimizer, batch())
    CALLS.update(left=1, factor=factor)

    train(model, optimizer, batch(2), rate=5.0)

    assert guard.last.status == status
    assert guard.last.reason.endswith(OTHER)


def test_fault_of_rounding_is_told_from_one_beyond_it():
    reasons = []
    for factor in (1 + 1e-5, 1.1):
        model, optimizer, guard = run()
        CALLS.update(left=1, factor=factor)
        train(model, optimizer, batch(), rate=1e4)
        reasons.append(guard.last.reason)

    assert "the same result up to rounding: the data or the rate is" in reasons[0]
    assert reasons[1].endswith(OTHER)


def test_large_output_is_compared_by_its_ends_where_they_are_known():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.fault = nn.Linear(5, 40_000), Flaky()

        def forward(self, inputs):
            return self.fault(self.head(inputs))

    for estimator, factor, told in (
        ("auto", 1.0, SAME), ("auto", 3.0, OTHER), ("jvp", 1.0, "was not kept"),
    ):  # fmt: skip
        model, optimizer, guard = run(Wide(), estimator=estimator)
        CALLS.update(left=1, factor=factor)
        train(model, optimizer, batch(rows=2), rate=1e4)
        assert told in guard.last.reason


def test_second_run_leaves_no_trace(monkeypatch):
    def trained():
        model, optimizer, _ = run()
        for seed in range(5):
            train(model, optimizer, batch(seed), rate=1e4 if seed % 2 else 0.05)
        return copy.deepcopy((model.state_dict(), optimizer.state_dict())), torch.rand(3)

    seen = trained()
    monkeypatch.setattr(SecondRun, "explain", lambda self, report, *_: report)

    assert_bitwise_equal(seen, trained())


def test_step_that_is_left_alone_runs_nothing_again(monkeypatch):
    model, optimizer, guard = run(max_normalized_step=1e9)

    def refuse(*_):
        raise AssertionError("a second run")

    monkeypatch.setattr(SecondRun, "_compare", refuse)
    for seed in range(4):
        train(model, optimizer, batch(seed), rate=5.0)
        assert (guard.last.status, guard.last.reason) == ("ok", None)


def test_long_row_of_same_results_is_run_again_ever_more_rarely(monkeypatch):
    model, optimizer, guard = run(max_normalized_step=1e-6)
    again = []
    for seed in range(40):
        train(model, optimizer, batch(seed), rate=1.0)
        if "run again" in guard.last.reason:
            again.append(seed)

    assert again == [*range(10), 15, 31]
    assert guard.last.reason.endswith("set the radius")


def spiked(*places, shape=(4, 5, 6)):
    tokens = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    for place in places:
        tokens[place] = 100
    return tokens


def test_row_is_told_as_example_and_token():
    model, optimizer, guard = run(LanguageModel())
    train(model, optimizer, spiked((2, 3)), rate=1e4)

    assert guard.last.reason.startswith("row 13 (example 2, token 3) set the radius; ")


def test_row_of_accumulated_batches_is_told_with_its_micro_batch():
    model, optimizer, guard = run(LanguageModel())
    for tokens in (spiked(), spiked((1, 4))):
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), torch.arange(20) % 3).backward()
    optimizer.param_groups[0]["lr"] = 1e4
    optimizer.step()

    told = "row 29 (micro-batch 1, example 1, token 4) set the radius; "
    assert guard.last.reason.startswith(told)
    assert guard.last.reason.endswith(SAME)


@pytest.mark.parametrize("is_logged", [True, False], ids=["logged", "not logged"])
def test_recorded_function_is_compared_by_the_loss_that_was_logged(is_logged):
    model, optimizer, guard = run()
    labels = torch.arange(6) % 3

    def step(inputs):
        return {"loss": nn.functional.cross_entropy(model(inputs), labels), "seen": 1}

    reasons = []
    for factor in (1.0, 50.0):
        optimizer.param_groups[0]["lr"] = 1e4
        optimizer.zero_grad()
        guard.record(step, batch())
        CALLS.update(left=1, factor=factor)
        loss = step(batch())["loss"]
        loss.backward()
        if is_logged:
            guard.log(loss=loss)
        optimizer.step()
        assert guard.last.status == "clipped"
        reasons.append(guard.last.reason)

    if is_logged:
        assert reasons[0].endswith(SAME)
        assert reasons[1].endswith(OTHER)
    else:
        assert all("log" in reason and "was not compared" in reason for reason in reasons)


@pytest.mark.parametrize("rows", [6, 20_000], ids=["small", "large"])
def test_inputs_that_changed_since_are_those_of_then_or_the_reason_says_so(rows, tmp_path):
    model, optimizer, guard = run(run_dir=tmp_path, keep_batches=1)
    inputs = batch(rows=rows)
    nn.functional.cross_entropy(model(inputs), torch.arange(rows) % 3).backward()
    inputs.fill_(torch.nan)
    model[0][0].weight.grad.fill_(torch.nan)
    optimizer.step()

    assert guard.last.status == "skipped"
    if rows == 6:
        assert SAME in guard.last.reason
        kept = torch.load(next(tmp_path.glob("*.pt")), weights_only=True)["calls"][0]["args"][0]
        assert torch.equal(kept, batch(rows=rows))
    else:
        told = "with a second run: argument 1 of the model (Tensor) was changed in place"
        assert told in guard.last.reason


def test_step_without_a_recorded_call_says_so():
    model, optimizer, guard = run()
    for param in model.parameters():
        param.grad = torch.full_like(param, torch.nan)
    optimizer.step()

    assert guard.last.reason.endswith("with a second run: no forward call was recorded")


def test_offending_inputs_are_kept_as_files_that_load_without_code(tmp_path):
    model, optimizer, guard = run(LanguageModel(), run_dir=tmp_path, keep_batches=2)
    train(model, optimizer, spiked())
    for seed in range(4):
        tokens = spiked((seed, 1))
        train(model, optimizer, tokens, rate=1e4, scale=1.0)
        if seed < 2:
            name = f"batch-{guard.state_dict()['run']}-step{seed + 1}.pt"
            assert guard.last.reason.endswith(f"its inputs are in {name}")
            kept = torch.load(tmp_path / name, weights_only=True)
            assert kept["step"] == seed + 1
            assert (kept["run"], kept["rank"]) == (guard.state_dict()["run"], 0)
            where = f"; its inputs are in {name}"
            assert guard.last.reason.replace(where, "") == kept["reason"]
            assert torch.equal(kept["calls"][0]["args"][0], tokens)
            assert kept["calls"][0]["kwargs"] == {"scale": 1.0}

    assert len(list(tmp_path.glob("*.pt"))) == 2
    assert "inputs are in" not in guard.last.reason


def test_no_inputs_are_kept_unless_asked_for(tmp_path):
    model, optimizer, guard = run(run_dir=tmp_path)
    train(model, optimizer, batch(), rate=1e4)

    assert guard.last.status == "clipped"
    assert not list(tmp_path.glob("*.pt"))


def test_inputs_of_any_kind_are_kept_as_plain_values(tmp_path):
    class Odd:
        def __repr__(self):
            return "an odd thing"

    class Nested(LanguageModel):
        def forward(self, features, *, odd=None):
            return self.head(features["tokens"][0])

    model, optimizer, _ = run(Nested(), run_dir=tmp_path, keep_batches=1)
    tokens = spiked((0, 0))
    train(model, optimizer, {"tokens": (tokens, None, 3, "text")}, rate=1e4, odd=Odd())

    kept = torch.load(next(tmp_path.glob("*.pt")), weights_only=True)["calls"][0]
    assert torch.equal(kept["args"][0]["tokens"][0], tokens)
    assert kept["args"][0]["tokens"][1:] == [None, 3, "text"]
    assert kept["kwargs"] == {"odd": "an odd thing"}


def test_file_that_cannot_be_written_is_told_once_and_training_goes_on(tmp_path, monkeypatch):
    model, optimizer, guard = run(run_dir=tmp_path, keep_batches=3)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match="no more batches are kept: .*no space left"):
        train(model, optimizer, batch(), rate=1e4)
    train(model, optimizer, batch(2), rate=1e4)

    assert guard.last.status == "clipped"
    assert guard.last.reason.endswith(SAME)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_batches": -1}, "expected `keep_batches` to be an integer of at least 0, got -1"),
        (
            {"keep_batches": True},
            "expected `keep_batches` to be an integer of at least 0, got True",
        ),
        ({"keep_batches": 2}, "expected a `run_dir` with `keep_batches`=2, got None"),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    output = tmp_path_factory.mktemp("second_run")
    run_script("second_run.py", output)
    found = [torch.load(output / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    return found, output


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_ranks_say_together_what_it_was_and_on_which_rank(ranks, kind):
    for found in ranks[0]:
        assert found[kind] == [("clipped", "same"), ("clipped", "other: rank 1")]


def test_each_rank_keeps_its_own_batch(ranks):
    found, output = ranks
    for rank, seen in enumerate(found):
        kept = torch.load(output / "log" / seen["file"], weights_only=True)
        assert (kept["rank"], kept["step"]) == (rank, 0)
        assert kept["run"] == found[0]["run"]
        assert torch.equal(kept["calls"][0]["args"][0], seen["inputs"])
        assert seen["file"].endswith(f"-step0-rank{rank}.pt")


def test_a_step_of_another_optimizer_in_between_is_no_fault_of_the_machine():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizers = [torch.optim.SGD(part.parameters(), lr=1e3) for part in (model[0], model[2])]
    guards = [SafeStep(optimizer, model) for optimizer in optimizers]
    functional.cross_entropy(model(torch.randn(6, 4)), torch.arange(6) % 3).backward()
    for optimizer in optimizers:
        optimizer.step()

    assert [guard.last.status for guard in guards] == ["clipped", "clipped"]
    assert guards[0].last.second_run == "same"
    why = "another optimizer has moved parameters since"
    assert guards[1].last.second_run == f"unknown: {why}"


def put_back_in_place(params, moves, starts):
    for param, move in zip(params, moves, strict=True):
        param.sub_(move)


def put_back_as_data(params, moves, starts):
    for param, start in zip(params, starts, strict=True):
        param.data = start


@pytest.mark.parametrize("put_back", [put_back_in_place, put_back_as_data])
def test_a_gradient_from_elsewhere_is_no_fault_of_the_machine(put_back):
    """Sharpness-aware minimization: the gradient is that at the top of a step uphill."""
    model, optimizer, guard = run(mlp(), estimator="jvp")
    params = list(model.parameters())
    for rate in (1e-3, 1e4):
        optimizer.param_groups[0]["lr"] = rate
        inputs, labels = batch(), torch.arange(6) % 3
        functional.cross_entropy(model(inputs), labels).backward()
        with torch.no_grad():
            moves = [0.1 * param.grad for param in params]
            starts = [param.detach().clone() for param in params]
            for param, move in zip(params, moves, strict=True):
                param.add_(move)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        with torch.no_grad():
            put_back(params, moves, starts)
        optimizer.step()
        optimizer.zero_grad()

    why = "the parameters moved between the forward call and the step"
    assert guard.last.status == "clipped"
    assert guard.last.second_run == f"unknown: {why}"
    assert guard.last.gradient_reason == why
