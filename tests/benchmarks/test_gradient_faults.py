"""The planted faults of the benchmark are seen, and their absence too."""

import runpy
from pathlib import Path

import pytest

script = runpy.run_path(str(Path(__file__).parent / "gradient_faults.py"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:SafeStep")
def test_each_fault_is_seen_in_the_step_that_has_it():
    training = script["Training"]("GPT, AdamW", "float32")
    for _ in range(30):
        assert not training.step()

    for name, fault in script["FAULTS"].items():
        assert training.step(fault), name
        assert not training.step(), name


@pytest.mark.parametrize("seen", [0.9, 1.0])
def test_the_tables_have_a_row_for_each_fault_and_model(seen):
    fault = {"fault": "a layer", "seen": seen, "delays": [3, None, 5], "false": 0}
    clean = {"model": "GPT", "dtype": "float32", "steps": 4, "audited": 4, "median": 1e-6}

    text = script["markdown"](
        {
            "faults": [fault | {"dtype": dtype} for dtype in ("float32", "bfloat16")],
            "clean": [clean | {"alarms": 0}],
        }
    )

    cells = f"{seen:.0%} | 3 to 5 (2 of 5)"
    assert f"| a layer | {cells} | {cells} |" in text
    assert "| GPT | float32 | 4 | 4 | 1.0e-06 | 0 |" in text
