"""The command line names its commands and refuses what it does not know."""

import subprocess
import sys

import pytest

from safestep.cli import COMMANDS, main
from safestep.runlog.writer import RunLog


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=str)
def test_help_is_there_for_every_command(words, capsys):
    with pytest.raises(SystemExit) as raised:
        main(words)

    assert raised.value.code == 0
    assert "usage: safestep" in capsys.readouterr().out


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])

    shown = capsys.readouterr().out
    assert all(name in shown and purpose in " ".join(shown.split())
               for name, (_, purpose) in COMMANDS.items())  # fmt: skip


@pytest.mark.parametrize("words", [[], ["retell"], ["--fast"], ["report"], ["report", "a", "--x"]])
def test_wrong_words_are_a_clear_error(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)

    error = capsys.readouterr().err
    assert "usage: safestep" in error
    assert "error: " in error


def test_version_is_told(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])

    assert capsys.readouterr().out.startswith("safestep ")


def test_command_runs_as_a_module():
    words = [sys.executable, "-m", "safestep", "--version"]

    done = subprocess.run(words, capture_output=True, text=True)

    assert done.stdout.startswith("safestep ")


@pytest.mark.parametrize("case", ["no run", "no log", "output is a file", "below a file", "empty"])
def test_error_is_one_line_in_words_of_the_command(case, tmp_path, capsys):
    run_dir, other = tmp_path / "run", tmp_path / "text"
    other.write_text("not a log")
    with RunLog(run_dir, {}) as log:
        log.write("step", {"step": 0})
    (tmp_path / "run.jsonl").touch()
    words, expected = {
        "no run": ([str(tmp_path / "nothing")], "expected `path` to be a run directory"),
        "no log": ([str(other)], "expected a safestep header in the first line"),
        "output is a file": ([str(run_dir), "--output", str(other)], "to be a folder, got"),
        "below a file": ([str(run_dir), "--output", str(other / "x")], "not a directory: "),
        "empty": ([str(tmp_path)], "got the empty file"),
    }[case]

    assert main(["report", *words]) == 2

    error = capsys.readouterr().err
    assert error.startswith("safestep report: ")
    assert expected in error
    assert error.count("\n") == 1
    for noise in ("[Errno", "read_run:", "write_report:", "run log:", "b'", "Traceback"):
        assert noise not in error


def test_command_line_imports_no_command_before_it_is_asked_for():
    script = (
        "import sys, safestep.cli\n"
        "heavy = {'matplotlib', 'lightning', 'safestep.report.write'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
