"""The command line names its commands and refuses what it does not know."""

import subprocess
import sys

import pytest

from safestep.cli import COMMANDS, main


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


def test_command_line_imports_no_command_before_it_is_asked_for():
    script = (
        "import sys, safestep.cli\n"
        "heavy = {'matplotlib', 'lightning', 'safestep.report.write'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
