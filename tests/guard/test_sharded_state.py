"""State that is spread over ranks is undone and scaled on every rank."""

import pytest
import torch
from helpers.compare import assert_bitwise_equal
from helpers.scripts import run_script
from torch import nn


@pytest.mark.slow
def test_zero_redundancy_optimizer_is_undone_and_scaled(tmp_path, dense_normalized_step):
    run_script("sharded_state.py", tmp_path, 2)
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=False) for r in range(2)]

    for seen in ranks:
        assert_bitwise_equal(seen[True], seen[False])
        status, state = seen["skipped"]
        assert status == "skipped"
        assert_bitwise_equal(state, seen[True])
        assert_bitwise_equal(*seen["state"])
        assert seen["clipped"][0] == "clipped"
        assert_bitwise_equal(seen["clipped"][1], ranks[0]["clipped"][1])
    before, after = (nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3)) for _ in "12")
    before.load_state_dict(ranks[0][True])
    after.load_state_dict(ranks[0]["clipped"][1])
    inputs = [seen["clipped"][2] for seen in ranks]
    assert dense_normalized_step(before, after, *inputs) == pytest.approx(1.0, rel=1e-4)
