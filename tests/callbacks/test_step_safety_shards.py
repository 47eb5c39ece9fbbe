"""StepSafety on modules that shard themselves, under Lightning's ModelParallelStrategy."""

import math

import pytest
import torch
from helpers.scripts import run_script
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Return a function from scenarios to what each rank saw in them."""

    def run(num_ranks, *names):
        output = tmp_path_factory.mktemp("sharded")
        run_script("sharded_trainer.py", output, num_ranks, *names, timeout=180)
        return {
            name: [torch.load(output / f"{name} {rank}.pt") for rank in range(num_ranks)]
            for name in names
        }

    return run


@pytest.fixture(scope="module")
def found(train):
    """What each rank saw in every scenario; one start for those of two ranks."""
    two = [
        "clipped", "manual", "accumulated", "bf16-true", "watched", "unguarded", "resumed",
        "tensor parallel", "flattened", "flattened, unguarded",
    ]  # fmt: skip
    return train(2, *two) | train(4, "replicated")


def whole(state):
    block = nn.Sequential(nn.Linear(7, 7), nn.LayerNorm(7), nn.Tanh())
    net = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), block, nn.Linear(7, 4, bias=False))
    net.load_state_dict(state)
    return net


def applied(ranks, dense_normalized_step, accumulated=1):
    """Yield for each step the largest r over the ranks' batches, in float64 and unsharded."""
    num_batches = len(ranks[0]["batches"])
    assert num_batches > 0
    for first in range(0, num_batches, accumulated):
        span = slice(first, first + accumulated)
        before, after, _ = ranks[0]["batches"][span][-1]
        inputs = [batch[2] for rank in ranks for batch in rank["batches"][span]]
        yield dense_normalized_step(whole(before), whole(after), *inputs)


@pytest.mark.parametrize(
    ("scenario", "accumulated"),
    [("clipped", 1), ("manual", 1), ("accumulated", 2), ("replicated", 1)],
)
def test_sharded_modules_are_clipped_to_the_limit_alike_on_all_ranks(
    found, dense_normalized_step, scenario, accumulated
):
    first, *others = found[scenario]

    for r in applied(found[scenario], dense_normalized_step, accumulated):
        assert r == pytest.approx(1.0, rel=1e-4)  # float32
    assert {report["status"] for report in first["reports"]} == {"clipped"}
    for other in others:
        assert [r["scale"] for r in other["reports"]] == [r["scale"] for r in first["reports"]]
        for one, two in zip(first["batches"], other["batches"], strict=True):
            assert all(map(torch.equal, one[1].values(), two[1].values()))


@pytest.mark.parametrize(("scenario", "tolerance"), [("watched", 1e-4), ("bf16-true", 0.03)])
def test_sharded_modules_are_measured_like_whole_ones(
    found, dense_normalized_step, scenario, tolerance
):
    expected = list(applied(found[scenario], dense_normalized_step))

    for rank in found[scenario]:
        measured = [report["normalized_step"] for report in rank["reports"]]
        assert measured == pytest.approx(expected, rel=tolerance)
        assert {report["status"] for report in rank["reports"]} == {"ok"}


@pytest.mark.parametrize("scenario", ["watched", "replicated"])
def test_sharded_modules_have_the_step_norm_of_the_whole_update(found, scenario):
    for index, (before, after, _) in enumerate(found[scenario][0]["batches"]):
        squares = [float((after[name] - before[name]).double().square().sum()) for name in before]
        for rank in found[scenario]:
            report = rank["reports"][index]
            distance = report["scale"] * report["step_norm"]
            assert distance == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)


def test_sharded_modules_train_bitwise_as_without_a_guard_that_only_watches(found):
    for guarded, plain in zip(found["watched"], found["unguarded"], strict=True):
        for one, two in zip(guarded["batches"], plain["batches"], strict=True):
            assert all(map(torch.equal, one[1].values(), two[1].values()))


def test_sharded_modules_resume_bitwise_from_a_sharded_checkpoint(found):
    for rank in found["resumed"]:
        whole, resumed = rank["whole"], rank["resumed"]
        number = len(resumed["batches"])
        assert 0 < number == len(whole["batches"]) // 2
        assert [r["step"] for r in resumed["reports"]] == list(range(number, 2 * number))
        for one, two in zip(whole["batches"][-number:], resumed["batches"], strict=True):
            assert all(map(torch.equal, one[1].values(), two[1].values()))


@pytest.mark.parametrize(("kind", "way"), [("flattened", "difference"), ("tensor parallel", "jvp")])
def test_flattened_modules_are_measured_by_difference_and_tensor_parallel_ones_exactly(
    found, kind, way
):
    for rank in found[kind]:
        assert len(rank["reports"]) == len(rank["batches"]) > 0
        for report in rank["reports"]:
            assert report["status"] in ("ok", "clipped")
            assert report["estimator"].startswith((way, "secant", "predicted"))
            assert report["step_norm"] > 0


def test_lightning_itself_keeps_its_own_fsdp_strategy_off_a_cpu():
    """So a subclass, which it lets pass, stands for it in the tests of flattened modules."""
    with pytest.raises(ValueError, match="`fsdp` requires a GPU accelerator"):
        Trainer(accelerator="cpu", devices=2, strategy=FSDPStrategy(), logger=False)


def test_flattened_modules_train_bitwise_as_without_a_guard_that_does_not_intervene(found):
    for guarded, plain in zip(found["flattened"], found["flattened, unguarded"], strict=True):
        assert {report["status"] for report in guarded["reports"]} == {"ok"}
        for one, two in zip(guarded["batches"], plain["batches"], strict=True):
            assert all(map(torch.equal, one[1].values(), two[1].values()))
