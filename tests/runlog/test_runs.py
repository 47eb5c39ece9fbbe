"""One file holds one run: the newest is shown, the earlier are still there, none are added up."""

import gc
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from safestep import SafeStep, read_run
from safestep.runlog.reader import list_runs
from safestep.runlog.series import step_series
from safestep.runlog.waiting import WaitingRecords
from safestep.runlog.writer import RunLog
from safestep.workers.metrics import WorkerMetrics


def steps_of(path):
    return read_run(path).steps["step"].tolist()


def write(log, *steps):
    for step in steps:
        log.write("step", {"step": step})


def cell(run_dir, lr, num_steps=20):
    """A notebook's cell: the guard of its first run is still attached in the second."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    guard = SafeStep(optimizer, model, run_dir=run_dir)
    inputs, targets = torch.randn(64, 20), torch.randint(5, (64,))

    def train(num_steps):
        for _ in range(num_steps):
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()

    train(num_steps)
    return guard, train


def test_cell_run_twice_shows_the_second_run_and_keeps_the_first(tmp_path):
    first, go_on = cell(tmp_path, 1e-2)
    largest = step_series(read_run(tmp_path)).proposed.max()
    cell(tmp_path, 2e-2)
    go_on(5)  # the first guard is still attached

    second, earlier = list_runs(tmp_path)

    series = step_series(read_run(tmp_path))
    assert series.proposed.max() == read_run(tmp_path)["normalized_step"].max() != largest
    assert steps_of(second.path) == list(range(20))
    assert steps_of(earlier.path) == list(range(25))
    assert step_series(read_run(earlier.path)).proposed[:20].max() == largest
    assert first.state_dict()["run"] == earlier.run != second.run


def test_script_run_again_keeps_every_run(tmp_path):
    script = (
        "import sys; from safestep.runlog.writer import RunLog\n"
        "log = RunLog(sys.argv[1], {})\n"
        "for step in range(int(sys.argv[2])): log.write('step', {'step': step})\n"
    )
    for number in "5", "3", "4":
        subprocess.run([sys.executable, "-c", script, str(tmp_path), number], check=True)

    runs = list_runs(tmp_path)

    assert runs[0].path.name == "run.jsonl"
    assert [len(steps_of(run.path)) for run in runs] == [4, 3, 5]
    assert len({run.run for run in runs}) == 3


def test_two_processes_at_once_write_a_file_each(tmp_path):
    script = (
        "import sys, time; from safestep.runlog.writer import RunLog\n"
        "log = RunLog(sys.argv[1], {})\n"
        "sys.stdin.readline()\n"
        "for step in range(200): log.write('step', {'step': step, 'who': int(sys.argv[2])})\n"
    )
    commands = [[sys.executable, "-c", script, str(tmp_path), str(who)] for who in range(3)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE) for command in commands]
    for process in processes:
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert [process.communicate() and process.returncode for process in processes] == [0, 0, 0]

    runs = [read_run(run.path) for run in list_runs(tmp_path)]

    assert [run.steps["step"].tolist() for run in runs] == [list(range(200))] * 3
    assert {len(set(run["who"])) for run in runs} == {1}


def test_writers_made_before_the_first_record_share_a_run_of_one_model(tmp_path):
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    logs = [RunLog(tmp_path, {name: 1}, owners=model.parameters()) for name in "ab"]
    stranger = RunLog(tmp_path, {"c": 1}, owners=other.parameters())
    for log in (*logs, stranger):
        write(log, 0)

    newest, shared = list_runs(tmp_path)

    assert newest.header["settings"] == {"c": 1}
    assert shared.header["settings"] == {"a": 1, "b": 1}
    assert steps_of(shared.path) == [0, 0]


def test_guards_of_two_optimizers_and_metrics_share_a_run(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model]
    guards = [SafeStep(optimizer, model, run_dir=tmp_path) for optimizer in optimizers]
    metrics = WorkerMetrics(model, run_dir=tmp_path)
    for _ in range(2):
        loss = cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,)))
        loss.backward()
        metrics.record(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    (run,) = list_runs(tmp_path)

    assert steps_of(run.path) == [0, 0, 1, 1]
    assert read_run(run.path).workers["step"].tolist() == [0, 1]
    ids = {state["run"] for state in (*map(SafeStep.state_dict, guards), metrics.state_dict())}
    assert ids == {run.run}


def test_only_a_loaded_state_resumes_a_run(tmp_path):
    guard, _ = cell(tmp_path, 1e-2)
    state = guard.state_dict()
    guard.detach()
    cell(tmp_path, 1e-2)[0].detach()
    resumed, go_on = cell(tmp_path, 1e-2, num_steps=0)
    resumed.load_state_dict(state)
    go_on(3)

    newest, earlier = list_runs(tmp_path)

    assert newest.run == state["run"] != earlier.run
    assert steps_of(tmp_path) == list(range(23))
    assert steps_of(earlier.path) == list(range(20))
    assert [event["name"] for event in read_run(tmp_path).events] == ["logits", "resumed"]


def test_rolling_back_supersedes_the_steps_taken_again(tmp_path):
    guard, go_on = cell(tmp_path, 1e-2, num_steps=5)
    state = guard.state_dict()
    go_on(5)
    guard.load_state_dict(state)
    go_on(2)

    assert steps_of(tmp_path) == list(range(7))


def test_run_that_another_process_still_writes_is_not_resumed(tmp_path):
    script = (
        "import sys; from safestep.runlog.writer import RunLog\n"
        "log = RunLog(sys.argv[1], {}); log.write('step', {'step': 0})\n"
        "print(log.run, flush=True); sys.stdin.readline(); log.write('step', {'step': 1})\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other, RunLog(tmp_path, {}) as log:
        run = other.stdout.readline().strip()
        log.resume(run)
        write(log, 7)
        other.communicate("\n")

    newest, earlier = list_runs(tmp_path)

    assert earlier.run == run
    assert (steps_of(newest.path), steps_of(earlier.path)) == ([7], [0, 1])


def test_run_resumed_in_this_process_is_taken_over_from_a_guard_left_attached(tmp_path):
    first, second = RunLog(tmp_path, {}), None
    write(first, 0, 1)
    second = RunLog(tmp_path, {})
    second.resume(first.run)
    write(second, 1, 2)
    write(first, 2)  # of the guard that was left: its run goes on without it

    assert steps_of(tmp_path) == [0, 1, 2]
    assert len(list_runs(tmp_path)) == 1


def test_run_resumed_in_another_directory_keeps_its_id(tmp_path):
    with RunLog(tmp_path / "one", {}) as log:
        write(log, 0)
    with RunLog(tmp_path / "two", {}) as resumed:
        resumed.resume(log.run)
        write(resumed, 1)

    assert list_runs(tmp_path / "two")[0].run == log.run
    assert [event["name"] for event in read_run(tmp_path / "two").events] == ["resumed"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_process_leaves_the_file_to_its_parent(tmp_path):
    log = RunLog(tmp_path, {})
    write(log, 0)
    child = os.fork()
    if child == 0:
        write(log, 1)
        os._exit(0)
    os.waitpid(child, 0)
    write(log, 2)
    run = log.run
    log.close()

    assert {steps_of(entry.path)[-1]: entry.run == run for entry in list_runs(tmp_path)} == {
        1: False, 2: True,
    }  # fmt: skip


def lost(run_dir):
    """Return what the log says about records that could not be written."""
    return [e["message"] for e in read_run(run_dir).events if e["name"] == "gap"]


def test_deleted_directory_is_said_once_and_not_made_again(tmp_path):
    log = RunLog(tmp_path / "run", {})
    write(log, 0)
    shutil.rmtree(tmp_path / "run")

    with pytest.warns(UserWarning, match=r"no more records in .*was deleted.* kept in memory"):
        write(log, 1)
    write(log, *range(2, 100))

    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="the last 99 records .* are lost"):
        log.close()


def test_nothing_is_lost_where_the_directory_comes_back(tmp_path):
    log = RunLog(tmp_path / "run", {})
    write(log, 0)
    (tmp_path / "run").rename(tmp_path / "away")
    with (tmp_path / "run").open("w"):  # not even a directory can be made there
        write(log, 1)  # the open file goes with its directory
        log._run.close()  # as an unmounted file system takes it away
        with pytest.warns(UserWarning, match="no more records"):
            write(log, *range(2, 20))
    (tmp_path / "run").unlink()
    (tmp_path / "away").rename(tmp_path / "run")
    write(log, *range(20, 50))

    assert steps_of(tmp_path / "run") == list(range(50))
    assert lost(tmp_path / "run") == [
        "the log could not be written for a while; no records are lost"
    ]
    log.close()


def test_directory_that_was_deleted_and_made_anew_gets_all_records_back(tmp_path):
    """The file is open, so its content is still there; a torn last record is cut off."""
    log = RunLog(tmp_path / "run", {"note": "mine"})
    write(log, *range(50))
    log._run._file.append(b'{"kind": "step", "st')
    for first in (50, 150):
        shutil.rmtree(tmp_path / "run")
        with pytest.warns(UserWarning, match="was deleted"):
            write(log, *range(first, first + 50))
        (tmp_path / "run").mkdir()
        write(log, *range(first + 50, first + 100))

    assert steps_of(tmp_path / "run") == list(range(250))
    run = read_run(tmp_path / "run")
    assert (run.header["run"], run.settings, run.left_out) == (log.run, {"note": "mine"}, ())
    assert len(list((tmp_path / "run").iterdir())) == 1


@pytest.mark.filterwarnings("ignore:safestep. no more records")
@pytest.mark.parametrize("most", [1 << 20, 100], ids=["room for all", "room for few"])
def test_directory_made_anew_gets_the_records_that_were_kept(tmp_path, monkeypatch, most):
    log = RunLog(tmp_path / "run", {"action": "clip"})
    log._run._waiting = WaitingRecords(most_bytes=most)
    write(log, 0)
    shutil.rmtree(tmp_path / "run")
    write(log, *range(1, 30))
    (tmp_path / "run").mkdir()
    log.close()

    steps, (said,) = steps_of(tmp_path / "run"), lost(tmp_path / "run")
    assert steps == [0, *range(31 - len(steps), 30)]
    assert said.endswith(f"{'no' if most > 100 else 30 - len(steps)} records are lost")
    assert read_run(tmp_path / "run").header["run"] == log.run


@pytest.mark.filterwarnings("ignore:safestep. no more records")
def test_nothing_is_lost_where_a_full_disk_has_room_again(tmp_path):
    resource = pytest.importorskip("resource")
    log = RunLog(tmp_path, {})
    write(log, *range(10))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 20, limits[1]))
    try:
        write(log, *range(10, 50))  # the first of them is torn
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write(log, *range(50, 80))

    assert steps_of(tmp_path) == list(range(80))
    assert lost(tmp_path) == ["the log could not be written for a while; no records are lost"]
    assert len(list_runs(tmp_path)) == 1


@pytest.mark.filterwarnings("ignore:safestep. no more records")
def test_resume_while_nothing_can_be_written_touches_no_other_file(tmp_path):
    log = RunLog(tmp_path / "run", {})
    write(log, 0, 1, 2)
    shutil.rmtree(tmp_path / "run")
    write(log, 3)
    with (tmp_path / "other").open("w") as other:  # may get the number of the closed file
        log.resume(log.run)
        write(log, 2, 3)
        other.flush()
        assert (tmp_path / "other").read_text() == ""
    (tmp_path / "run").mkdir()
    log.close()

    assert steps_of(tmp_path / "run") == [0, 1, 2, 3]


def test_directory_deleted_before_the_first_record_is_made_again(tmp_path):
    log = RunLog(tmp_path / "run", {})
    shutil.rmtree(tmp_path / "run")
    write(log, 0)

    assert steps_of(tmp_path / "run") == [0]


def test_records_of_another_run_are_never_added(tmp_path):
    with RunLog(tmp_path, {}) as log:
        write(log, 0)
    with log.path.open("a") as file:
        file.write('{"kind": "step", "run": "another", "step": 0}\n')

    with pytest.warns(UserWarning, match="left out 1 records of other runs"):
        assert steps_of(tmp_path) == [0]


def test_log_of_an_earlier_version_is_kept_beside_the_new_run(tmp_path):
    old = '{"kind": "header", "schema_version": 1, "settings": {}}\n{"kind": "step", "step": 9}\n'
    (tmp_path / "run.jsonl").write_text(old)
    with RunLog(tmp_path, {}) as log:
        write(log, 0)

    newest, earlier = list_runs(tmp_path)

    assert (steps_of(newest.path), steps_of(earlier.path)) == ([0], [9])
    assert earlier.run is None


def test_id_in_a_log_is_not_trusted_as_a_file_name(tmp_path):
    header = '{"kind": "header", "schema_version": 1, "run": "../../x", "settings": {}}\n'
    (tmp_path / "run" / "deep").mkdir(parents=True)
    (tmp_path / "run" / "deep" / "run.jsonl").write_text(header)
    with RunLog(tmp_path / "run" / "deep", {}) as log:
        write(log, 0)

    assert len(list_runs(tmp_path / "run" / "deep")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_log_of_a_guard_that_is_gone_is_closed(tmp_path):
    log = RunLog(tmp_path, {})
    write(log, 0)
    run = log.run
    del log
    gc.collect()
    with RunLog(tmp_path, {}) as resumed:
        resumed.resume(run)
        write(resumed, 1)

    assert steps_of(tmp_path) == [0, 1]
