"""No value of a log is lost to the memory that its column would take."""

import subprocess
import sys

import numpy as np
import pytest

from safestep.runlog import columns
from safestep.runlog.columns import ColumnBuilder
from safestep.runlog.reader import read_run
from safestep.runlog.series import drawable
from safestep.runlog.writer import RunLog

PEAK = """
import resource, sys, warnings
warnings.simplefilter("ignore")
import safestep
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
before = peak()
run = safestep.read_run(sys.argv[1])
assert all(np.isfinite(run[name]).any() for np in [__import__("numpy")] for name in run.steps)
print(peak() - before, len(run.steps), run.left_out)
"""


@pytest.fixture
def few(monkeypatch):
    """Make columns at once only where they take less than four kilobytes."""
    monkeypatch.setattr(columns, "_MIN_BYTES", 1 << 12)
    monkeypatch.setattr(columns, "_MAX_GROWTH", 0)


def built(tmp_path, records):
    builder = ColumnBuilder(tmp_path)
    for line, record in enumerate(records):
        builder.add(record, line)
    return builder, builder.build()


def test_columns_of_rare_keys_are_made_when_asked_for(tmp_path, few):
    records = [{"step": s, "often": s, f"rare {s % 90}": s, "radius": 2.0} for s in range(270)]
    records[7]["text"] = "here"

    builder, found = built(tmp_path, records)

    assert builder.left_out == []
    assert len(found) == 94
    assert {"rare 0", "text"} <= found.keys()
    assert callable(found._columns["rare 0"])
    assert not callable(found._columns["radius"])
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(found["rare 5"])), [5, 95, 185])
    assert found["rare 5"][95] == 95
    assert (found["text"][7], found["text"][8]) == ("here", None)


def test_rare_values_of_steps_taken_again_are_superseded(tmp_path, few):
    builder = ColumnBuilder(tmp_path)
    for step in range(300):
        builder.add({"step": step, f"rare {step % 100}": 1.0}, step)
    builder.start_segment()
    builder.add({"step": 250, "rare 1": 2.0}, 300)
    found = builder.build()

    assert found["step"].tolist() == list(range(251))
    assert found["rare 1"][[1, 101, 201, 250]].tolist() == [1.0, 1.0, 1.0, 2.0]


def test_lists_far_longer_than_the_others_have_a_column_of_their_own(tmp_path, few):
    records = [{"step": s, "loss": [float(s)] * (500 if s == 3 else 2)} for s in range(200)]

    builder, found = built(tmp_path, records)

    assert found["loss"].shape == (200, 2)
    assert np.isnan(found["loss"][3]).all()
    (one,) = [each for each in found["loss (long)"] if each is not None]
    np.testing.assert_array_equal(one, np.full(500, 3.0))
    assert builder.left_out == [
        "1 lists of `loss` are in the column `loss (long)`: of up to 500 numbers, where the others "
        "have up to 2"
    ]


def test_more_keys_than_a_log_may_have_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "MAX_FIELDS", 10)

    builder, found = built(tmp_path, [{"step": 0, **dict.fromkeys(map(str, range(30)), 1)}])
    _, own = built(tmp_path, [{"step": 0, **dict.fromkeys(map(str, range(30)), 1), "radius": 2}])

    assert len(found) == 10
    assert builder.left_out == ["21 values of keys beyond the first 10 are left out"]
    assert own["radius"] == [2.0]


def test_rare_columns_can_be_drawn(tmp_path, few):
    with RunLog(tmp_path, {}) as log:
        for step in range(300):
            log.write("step", {"step": step, f"rare {step % 100}": 1e301})

    run = drawable(read_run(tmp_path))

    assert np.nanmax(run["rare 99"]) == 1e100


@pytest.mark.slow
@pytest.mark.parametrize("num_keys", [500, 50_000])
def test_log_of_many_keys_takes_memory_in_proportion_and_loses_none(tmp_path, num_keys):
    """61 MB."""
    with RunLog(tmp_path, {}) as log:
        log.write("step", {"step": 0})
    with log.path.open("a") as file:
        file.writelines(
            f'{{"kind":"step","step":{step},"k{step % num_keys}":1}}\n' for step in range(1_500_000)
        )
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    megabytes, count, left_out = done.stdout.split(maxsplit=2)

    assert float(megabytes) < 600
    assert int(count) == num_keys + 1
    assert left_out.strip() == "()"
