"""StepSafety on a GAN of two optimizers, on two real ranks of a Trainer."""

import pytest
import torch
from helpers.scripts import run_script
from torch import nn

STEPS = 8  # four batches, two optimizers
GENERATOR = 0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    """Every scenario's steps, rank by rank: optimizer, parameters around it, inputs, report."""
    output = tmp_path_factory.mktemp("gan")
    run_script("adversarial_trainer.py", output)
    found = {
        folder.name: [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
        for folder in output.iterdir()
    }
    assert {len(steps) for ranks in found.values() for steps in ranks} == {STEPS}
    return found


def network(optimizer, state):
    """Return what maps an optimizer's inputs to its logits."""
    generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8))
    discriminator = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    nn.ModuleDict({"generator": generator, "discriminator": discriminator}).load_state_dict(state)
    return nn.Sequential(generator, discriminator) if optimizer == GENERATOR else discriminator


def largest_normalized_step(ranks, step, dense_normalized_step):
    """Return the r of the step that was made, over the inputs of both ranks."""
    optimizer, before, after, _, _ = ranks[0][step]
    inputs = [steps[step][3] for steps in ranks]
    return dense_normalized_step(network(optimizer, before), network(optimizer, after), *inputs)


def assert_same_bits(one, other):
    for step, reference in zip(one, other, strict=True):
        assert all(map(torch.equal, step[2].values(), reference[2].values()))


def test_each_optimizer_has_reports_of_its_own_on_both_ranks(scenarios, dense_normalized_step):
    ranks = scenarios["watched"]

    for step in range(STEPS):
        reports = [steps[step][4] for steps in ranks]
        expected = largest_normalized_step(ranks, step, dense_normalized_step)
        assert [report["step"] for report in reports] == [step // 2] * 2
        assert {report["status"] for report in reports} == {"ok"}
        for report in reports:
            assert report["normalized_step"] == pytest.approx(expected, rel=1e-4)  # float32


def test_each_optimizer_is_clipped_to_the_limit_of_the_tightest_rank(
    scenarios, dense_normalized_step
):
    ranks, clipped = scenarios["clipped"], set()

    for step in range(STEPS):
        optimizer, *_, first = ranks[0][step]
        second = ranks[1][step][4]
        assert (first["status"], first["scale"]) == (second["status"], second["scale"])
        applied = largest_normalized_step(ranks, step, dense_normalized_step)
        if first["status"] == "clipped":
            clipped.add(optimizer)
            assert applied == pytest.approx(1.0, rel=1e-4)  # float32
        else:
            assert (first["status"], applied <= 1) == ("ok", True)
    assert len(clipped) == 2


@pytest.mark.parametrize("scenario", ["watched", "clipped"])
def test_ranks_stay_bitwise_equal(scenarios, scenario):
    assert_same_bits(*scenarios[scenario])


def test_a_guard_that_only_watches_leaves_both_ranks_bitwise_alone(scenarios):
    for guarded, unguarded in zip(scenarios["watched"], scenarios["unguarded"], strict=True):
        assert_same_bits(guarded, unguarded)
