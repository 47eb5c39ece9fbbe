"""What is written to run.jsonl comes back; what is damaged is named or skipped, never guessed."""

import csv
import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from safestep.runlog import reader
from safestep.runlog.reader import read_run
from safestep.runlog.writer import RunLog

HEADER = '{"kind": "header", "schema_version": 1, "settings": {}}\n'


def step_record(step, **fields):
    return {
        "step": step,
        "normalized_step": 0.5,
        "radius": 2.0,
        "step_norm": 1.0,
        "spread": math.pi / 2,
        "scale": 1.0,
        "learning_rate": 0.1,
        "effective_learning_rate": 0.1,
        "estimator": "jvp",
        "status": "ok",
        "seconds": 0.01,
        "bottleneck": 3,
        "reason": None,
        **fields,
    }


def write_lines(run_dir, *lines, header=HEADER):
    (run_dir / "run.jsonl").write_bytes((header + "".join(lines)).encode())
    return run_dir


def test_records_come_back_as_columns(tmp_path):
    with RunLog(tmp_path, {"action": "clip"}, world_size=2) as log:
        for step in range(3):
            log.write("step", step_record(step, normalized_step=step / 4, loss=1 / (step + 1)))
        log.write("workers", {"step": 2, "loss": [1.0, 3.0], "loss_std": 1.0, "outlier": None})
        log.write("event", {"step": 2, "name": "note", "message": "three steps"})

    run = read_run(tmp_path)

    assert run.header["world_size"] == 2
    assert run.settings == {"action": "clip"}
    assert run.steps["step"].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(run.steps["normalized_step"], [0, 0.25, 0.5])
    np.testing.assert_array_equal(run.steps["loss"], [1, 1 / 2, 1 / 3])
    assert run.steps["status"].tolist() == ["ok"] * 3
    assert run.steps["reason"].tolist() == [None] * 3
    np.testing.assert_array_equal(run.workers["loss"], [[1.0, 3.0]])
    assert np.isnan(run.workers["outlier"]).all()
    assert [event["message"] for event in run.events] == ["three steps"]
    assert not run.torn


def test_micro_batches_come_back_as_rows_and_those_taken_again_are_superseded(tmp_path):
    with RunLog(tmp_path, {}) as log:
        for step in range(3):
            for micro in range(2):
                log.write("micro", {"step": step, "micro": micro, "loss": [step, micro]})
    run_id = log.run
    with RunLog(tmp_path, {}) as log:
        log.resume(run_id)
        log.write("micro", {"step": 2, "micro": 0, "loss": [7.0, math.nan]})

    micro = read_run(tmp_path).micro

    assert micro["step"].tolist() == [0, 0, 1, 1, 2]
    assert micro["micro"].tolist() == [0, 1, 0, 1, 0]
    np.testing.assert_array_equal(micro["loss"][[3, 4]], [[1.0, 1.0], [7.0, math.nan]])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 5e-324, 0.1 + 0.2], ids=str)
@pytest.mark.parametrize(
    "wrap",
    [float, np.float64, lambda x: torch.tensor(x, dtype=torch.float64)],
    ids=["python", "numpy", "torch"],
)
def test_every_float_survives_the_round_trip(tmp_path, value, wrap):
    with RunLog(tmp_path, {}) as log:
        log.write("step", {"step": 0, "radius": wrap(value)})
        log.write("workers", {"step": 0, "loss": [wrap(value), 1.0]})

    run = read_run(tmp_path)

    np.testing.assert_array_equal(run.steps["radius"], [value])
    np.testing.assert_array_equal(run.workers["loss"], [[value, 1.0]])


def test_lines_are_json_that_any_reader_parses(tmp_path):
    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    with RunLog(tmp_path, {"limit": math.inf, "path": tmp_path, "shape": (1, 2)}) as log:
        log.write("step", {"step": 0, "radius": math.nan, "reason": "na\u00efve\n<b>"})

    for line in log.path.read_bytes().splitlines():
        json.loads(line.decode("ascii"), parse_constant=refuse)


def test_two_writers_share_one_file_and_both_settings(tmp_path):
    first = RunLog(tmp_path, {"action": "clip"})
    second = RunLog(tmp_path / ".." / tmp_path.name, {"every": 10})
    for step in range(100):
        first.write("step", step_record(step))
        second.write("workers", {"step": step, "loss": [1.0, 2.0]})
    first.close()
    second.write("event", {"step": 99, "name": "note", "message": "still open"})
    second.close()

    run = read_run(tmp_path)

    assert len(run.steps["step"]) == len(run.workers["step"]) == 100
    assert run.settings == {"action": "clip", "every": 10}
    assert [event["name"] for event in run.events] == ["note"]


def test_resumed_run_supersedes_the_steps_it_took_again(tmp_path):
    with RunLog(tmp_path, {"action": "monitor"}) as log:
        for step in range(10):
            log.write("step", step_record(step, scale=1.0))
            log.write("workers", {"step": step, "loss": [1.0]})
    run_id = log.run
    with RunLog(tmp_path, {"action": "clip"}) as log:
        log.resume(run_id)
        for step in range(6, 12):
            log.write("step", step_record(step, scale=0.5))

    run = read_run(tmp_path)

    assert run.steps["step"].tolist() == list(range(12))
    assert run.steps["scale"].tolist() == [1.0] * 6 + [0.5] * 6
    assert [event["name"] for event in run.events] == ["resumed"]
    assert run.settings == {"action": "clip"}
    assert len(run.workers["step"]) == 10  # the resumed part logged no workers


def test_two_optimizers_keep_both_records_of_a_step(tmp_path):
    with RunLog(tmp_path, {}) as log:
        for step in range(3):
            for optimizer in range(2):
                log.write("step", step_record(step, optimizer=optimizer))

    run = read_run(tmp_path)

    assert run.steps["step"].tolist() == [0, 0, 1, 1, 2, 2]
    assert run.steps["optimizer"].tolist() == [0, 1] * 3


def test_torn_last_line_is_skipped_and_said_so(tmp_path):
    write_lines(tmp_path, '{"kind": "step", "step": 0}\n', '{"kind": "step", "st')

    with pytest.warns(UserWarning, match="skipped the torn last line"):
        run = read_run(tmp_path)

    assert run.torn
    assert run.steps["step"].tolist() == [0]


def test_resuming_cuts_off_a_torn_last_line_of_any_length(tmp_path):
    torn = '{"kind": "step", "step": 1, "reason": "' + "x" * 200_000
    header = HEADER.replace('"settings"', '"run": "a", "settings"')
    write_lines(tmp_path, '{"kind": "step", "run": "a", "step": 0}\n', torn, header=header)

    with RunLog(tmp_path, {}) as log:
        log.resume("a")
        log.write("step", step_record(1))

    run = read_run(tmp_path)
    assert not run.torn
    assert run.steps["step"].tolist() == [0, 1]


@pytest.mark.parametrize("content", [b"", b'{"ki', b'{"kind": "header", "schema_v'], ids=repr)
def test_run_killed_inside_its_header_begins_anew(tmp_path, content):
    (tmp_path / "run.jsonl").write_bytes(content)

    with RunLog(tmp_path, {}) as log:
        log.write("step", step_record(0))

    assert read_run(tmp_path).steps["step"].tolist() == [0]


def test_writer_leaves_a_file_that_is_no_run_log_alone(tmp_path):
    (tmp_path / "run.jsonl").write_text("my notes")

    with pytest.raises(ValueError, match="expected a safestep header"):
        RunLog(tmp_path, {})

    assert (tmp_path / "run.jsonl").read_text() == "my notes"


def test_killed_process_loses_at_most_the_record_being_written(tmp_path):
    script = (
        "import sys, time; from safestep.runlog.writer import RunLog\n"
        "log = RunLog(sys.argv[1], {})\n"
        "for step in range(50): log.write('step', {'step': step})\n"
        "print('written', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)

    assert len(read_run(tmp_path).steps["step"]) == 50


def test_full_disk_warns_once_and_does_not_end_the_run(tmp_path):
    """A limit on file sizes stands for the full disk: the system refuses the write."""
    resource = pytest.importorskip("resource")
    log = RunLog(tmp_path, {})
    log.write("step", step_record(0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size, hard))
    try:
        with pytest.warns(UserWarning, match=r"no more records in .* Training goes on"):
            log.write("step", step_record(1))
        log.write("step", step_record(2))
        with pytest.warns(UserWarning, match=r"2 records could not be written .* and are lost"):
            log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert read_run(tmp_path).steps["step"].tolist() == [0]


def test_writing_to_a_closed_log_is_an_error(tmp_path):
    log = RunLog(tmp_path, {})
    log.close()
    log.close()

    with pytest.raises(RuntimeError, match="expected an open log"):
        log.write("step", step_record(0))


def test_unknown_kind_is_an_error(tmp_path):
    with RunLog(tmp_path, {}) as log, pytest.raises(ValueError, match=r"expected `kind` in"):
        log.write("steps", step_record(0))


def test_missing_and_unknown_keys_are_tolerated(tmp_path):
    write_lines(
        tmp_path,
        '{"kind": "step", "step": 0, "radius": 1.5}\n',
        '{"kind": "step", "step": 1, "loss": 0.5, "tag": "warm-up", "flag": true}\n',
        '{"kind": "workers", "step": 0, "loss": [1, 2]}\n',
        '{"kind": "workers", "step": 1, "loss": [1, 2, 3]}\n',
        '{"kind": "from a later version", "step": 1}\n',
    )

    run = read_run(tmp_path)

    np.testing.assert_array_equal(run.steps["radius"], [1.5, math.nan])
    np.testing.assert_array_equal(run.steps["loss"], [math.nan, 0.5])
    assert run.steps["tag"].tolist() == [None, "warm-up"]
    np.testing.assert_array_equal(run.steps["flag"], [math.nan, 1.0])
    np.testing.assert_array_equal(run.workers["loss"], [[1, 2, math.nan], [1, 2, 3]])


def test_run_without_records_has_empty_columns(tmp_path):
    run = read_run(write_lines(tmp_path))

    assert run.steps["step"].tolist() == run.workers["step"].tolist() == run.events == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty file"),
        ("hello\n", "expected a safestep header"),
        ("\x00\xff\n", "expected a safestep header"),
        ('["header"]\n', "expected a safestep header"),
        ('{"kind": "header", "schema_version": "1"}\n', "expected a safestep header"),
        ('{"kind": "header", "schema_version": 2}\n', r"schema version <= 1 .* got 2. Update"),
        (HEADER + '{"kind": "step"}\n', "whole number as `step`"),
        (HEADER + '{"kind": "step", "step": "nan"}\n', "whole number as `step`"),
        (HEADER + '{"kind": "step", "step": 0, "radius": "far"}\n', "numbers in `radius`"),
        (HEADER + '{"kind": "step", "step": 0, "scale": [1]}\n', "numbers in `scale`"),
        (HEADER + '{"kind": "step", "step": 0, "scale": 1' + "0" * 400 + "}\n", "`scale`"),
        (HEADER + '{"kind": "workers", "step": 0, "grad_norm": [[1]]}\n', "in `grad_norm`"),
    ],
)
def test_damaged_log_is_a_clear_error(tmp_path, content, message):
    (tmp_path / "run.jsonl").write_bytes(content.encode("latin-1"))

    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "line", ["hello", "[" * 100_000, '{"kind": "step", "st', "\x00\xff", "[1]"], ids=repr
)
def test_unreadable_line_in_the_middle_is_skipped_and_said_so(tmp_path, line):
    write_lines(
        tmp_path, '{"kind": "step", "step": 0}\n', line + "\n", '{"kind": "step", "step": 1}\n'
    )

    with pytest.warns(UserWarning, match="skipped 1 unreadable lines: 3, in "):
        run = read_run(tmp_path)

    assert run.steps["step"].tolist() == [0, 1]
    assert run.left_out == ("skipped 1 unreadable lines: 3",)


def test_record_that_follows_a_torn_one_on_its_line_is_read(tmp_path):
    write_lines(tmp_path, '{"kind": "step", "st{"kind": "workers", "step": 7, "loss": [1, 2]}\n')

    with pytest.warns(UserWarning, match="skipped 1 unreadable"):
        run = read_run(tmp_path)

    assert run.workers["step"].tolist() == [7]


@pytest.mark.parametrize("garbage", [40, 95, 100, 150, 260], ids=str)
def test_record_that_follows_an_over_long_line_without_an_end_is_read(
    tmp_path, monkeypatch, garbage
):
    monkeypatch.setattr(reader, "MAX_LINE_BYTES", 100)
    records = [f'{{"kind": "step", "step": {step}}}\n' for step in range(3)]
    write_lines(tmp_path, records[0], "[" * garbage, *records[1:])

    with pytest.warns(UserWarning, match="skipped 1 unreadable lines: 3, in "):
        run = read_run(tmp_path)

    assert run["step"].tolist() == [0, 1, 2]


def test_missing_directory_is_a_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="which is not there"):
        read_run(tmp_path / "nothing")


def test_directory_without_a_run_names_the_runs_below_it(tmp_path):
    RunLog(tmp_path / "outer" / "inner", {}).close()

    with pytest.raises(FileNotFoundError, match=r"Runs lie below it: .*inner"):
        read_run(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="Give a run's directory"):
        read_run(tmp_path / "empty")


def test_lightning_csv_gives_the_same_columns(tmp_path):
    """The layout of CSVLogger: one row a call, empty cells for what the call did not log."""
    rows = [
        {"epoch": 0, "step": 0, "safestep/normalized_step": 0.5, "safestep/scale": 1.0,
         "safestep/effective_lr": 0.1, "safestep/radius": "inf"},
        {"epoch": 0, "step": 0, "train_loss": 2.0, "workers/loss_std": 0.25},
        {"epoch": 0, "step": 1, "safestep/normalized_step": 4.0, "safestep/scale": 0.25,
         "safestep/effective_lr": 0.025, "safestep/radius": 1.0},
        {"epoch": 0, "step": 1, "train_loss": 1.0},
        {"epoch": 0, "step": 2, "val_acc": 0.9},
    ]  # fmt: skip
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)

    run = read_run(tmp_path)

    assert run.steps["step"].tolist() == [0, 1]
    np.testing.assert_array_equal(run.steps["radius"], [math.inf, 1.0])
    np.testing.assert_array_equal(run.steps["loss"], [2.0, 1.0])
    np.testing.assert_allclose(run.steps["learning_rate"], [0.1, 0.1])
    assert run.steps["status"].tolist() == ["ok", "clipped"]
    np.testing.assert_array_equal(run.workers["loss_std"], [0.25])


def test_csv_of_several_optimizers_gives_their_joint_step(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "step,safestep/normalized_step,safestep/scale/0,safestep/scale/1,safestep/step_norm/0,"
        "safestep/step_norm/1,safestep/effective_lr/0,safestep/effective_lr/1\n"
        "0,2.0,0.5,1.0,3.0,4.0,0.1,0.3\n"
    )

    steps = read_run(tmp_path).steps

    assert steps["scale"].tolist() == [0.5]
    assert steps["step_norm"].tolist() == [5.0]
    assert steps["radius"].tolist() == [2.5]
    assert steps["learning_rate"].tolist() == [0.2]
    assert steps["status"].tolist() == ["clipped"]


def test_csv_without_our_columns_is_a_clear_error(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train_loss\n0,1.0\n")

    with pytest.raises(ValueError, match=r"expected columns `step` and `safestep/"):
        read_run(tmp_path)


@pytest.mark.slow
def test_million_steps_are_read_in_seconds(tmp_path):
    lines = (
        json.dumps({"kind": "step", **step_record(step, loss=step**-0.5)}) + "\n"
        for step in range(1, 1_000_001)
    )
    with (tmp_path / "run.jsonl").open("w") as file:
        file.write(HEADER)
        file.writelines(lines)

    start = time.process_time()
    run = read_run(tmp_path)
    elapsed = time.process_time() - start

    assert len(run.steps["step"]) == 1_000_000
    assert elapsed < 60  # about 12 s on one core


def test_run_gives_step_columns_by_name(tmp_path):
    with RunLog(tmp_path, {}) as log:
        log.write("step", {"step": 0, "radius": 2.5})

    run = read_run(tmp_path)

    assert run["radius"].tolist() == [2.5]
    with pytest.raises(KeyError, match=r"'radii': the steps have the columns radius, step"):
        run["radii"]


def test_csv_with_a_cell_over_the_limit_of_the_csv_module_is_read(tmp_path):
    limit = csv.field_size_limit()
    long = "x" * (limit + 1)
    (tmp_path / "metrics.csv").write_text(f"step,safestep/radius,note\n0,2.5,{long}\n1,3.5,\n")

    assert read_run(tmp_path).steps["radius"].tolist() == [2.5, 3.5]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/nothing/here"])
def test_folder_that_cannot_be_made_is_named(tmp_path, name):
    (tmp_path / "file").write_text("")

    with pytest.raises(ValueError, match="`run_dir` to be a folder") as caught:
        RunLog(tmp_path / name, {})

    assert isinstance(caught.value.__cause__, OSError)
