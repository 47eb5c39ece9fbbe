"""Logits that ranks hold pieces of are measured like whole ones, over real gloo processes."""

import pytest
import torch
from helpers.scripts import run_script

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank saw in every scenario; one start of the processes for all of them."""
    output = tmp_path_factory.mktemp("vocabulary")
    run_script("parallel_vocabulary.py", output, timeout=300)
    return [torch.load(output / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("mode", ["vocabulary", "sequence"])
@pytest.mark.parametrize(
    ("scenario", "tolerance"),
    [("jvp", 1e-4), ("difference", 1e-3), ("auto", 1e-4), ("clipped", 1e-4), ("ahead", 1e-4)],
)
def test_a_cut_vocabulary_or_sequence_is_measured_like_a_whole_one(
    ranks, mode, scenario, tolerance
):
    for found in ranks:
        whole, cut = found["whole"][scenario], found[mode][scenario]
        assert [report["status"] for report in cut] == [report["status"] for report in whole]
        for name in ("normalized_step", "step_norm", "divergence"):
            expected = pytest.approx([report[name] for report in whole], rel=tolerance, nan_ok=True)
            assert [report[name] for report in cut] == expected, name


@pytest.mark.parametrize("mode", ["vocabulary", "sequence"])
@pytest.mark.parametrize("scenario", ["jvp", "ahead"])
def test_the_gradient_of_a_cut_vocabulary_or_sequence_is_audited(ranks, mode, scenario):
    """Ranks hold gradients of their own classes, or gradients that are still to be summed."""
    for found in ranks:
        ratios = [report["gradient_ratio"] for report in found[mode][scenario]]
        assert ratios == pytest.approx([1.0] * 3, rel=1e-4)
