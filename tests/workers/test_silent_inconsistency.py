"""Seeds that differ between ranks: what dispersion tells that the mean loss hides."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "processes" / "silent_inconsistency.py"
SETTINGS = ("S1-1", "S1-2", "S1-3")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Every setting's curves, from four real ranks."""
    output = tmp_path_factory.mktemp("silent")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(output)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output / "silent.json").read_text())


def means(found, way, quantity):
    return [float(np.mean(found[f"{way} {name}"][quantity])) for name in SETTINGS]


@pytest.mark.slow
def test_dispersion_orders_the_settings_where_each_rank_shuffles_the_data_itself(found):
    loss_std, norm_std = means(found, "own", "loss_std"), means(found, "own", "grad_norm_std")
    cosine = means(found, "own", "pairwise_cosine")

    assert loss_std[0] == norm_std[0] == 0  # one seed: every rank does the same work
    assert cosine[0] == pytest.approx(1)
    assert loss_std[2] > 1.2 * loss_std[1] > 0
    assert norm_std[2] > 1.2 * norm_std[1] > 0
    assert cosine[2] < cosine[1] - 0.2 < cosine[0] - 0.4


@pytest.mark.slow
def test_the_one_rank_with_another_seed_is_named(found):
    (message,) = found["own S1-2"]["events"]

    assert message == "rank 3: cosine to the mean far below the others since step 0"
    assert found["own S1-3"]["events"] == []


@pytest.mark.slow
def test_dispersion_does_not_tell_seeds_apart_where_the_data_are_dealt_out(found):
    """Ranks that work on different samples are alike whatever the seeds."""
    for quantity, tolerance in (("loss_std", 0.2), ("grad_norm_std", 0.2)):
        values = means(found, "dealt", quantity)
        assert max(values) < (1 + tolerance) * min(values)
    assert np.ptp(means(found, "dealt", "pairwise_cosine")) < 0.05
    assert all(found[f"dealt {name}"]["events"] == [] for name in SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["own", "dealt"])
def test_the_mean_loss_hides_the_settings(found, way):
    """Over the last steps the settings differ by less than one setting varies step by step."""
    last = [np.mean(found[f"{way} {name}"]["loss"], axis=1)[-20:] for name in SETTINGS]

    assert np.ptp([losses.mean() for losses in last]) < max(losses.std() for losses in last)
