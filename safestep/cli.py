"""The command ``safestep``; each sub-command is a module with two functions.

``add_arguments(parser)`` adds its options, ``run(arguments)`` returns its exit status. A module is
imported only when its sub-command is asked for.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from importlib import import_module, metadata

COMMANDS = {  # name: module, what it does
    "demo": ("safestep.demo.command", "watch a run that plain Adam loses and safestep saves"),
    "report": ("safestep.report.write", "turn the logs of runs into figures and one page"),
}
_EXPECTED_ERRORS = (ImportError, OSError, ValueError)  # of a missing or wrong file or option


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after ``safestep``; by default those of the process.

    Returns:
        Exit status: 0, or 2 after an error, which is told in one line on standard error.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    chosen = _parser().parse_args(words[:1]).command
    module_name, purpose = COMMANDS[chosen]
    module = import_module(module_name)
    parser = argparse.ArgumentParser(
        prog=f"safestep {chosen}", description=f"{purpose[0].upper()}{purpose[1:]}."
    )
    module.add_arguments(parser)
    options = parser.parse_args(words[1:])
    try:
        return module.run(options)
    except _EXPECTED_ERRORS as error:
        sys.stderr.write(f"safestep {chosen}: {explain(error)}\n")
        return 2


def explain(error: Exception) -> str:
    """Return an error as one line for someone who typed a command, not a call.

    Args:
        error: What was raised.

    Returns:
        What was expected and what to do; of the system's errors, what happened to which file.

    Example:
        >>> explain(FileExistsError(17, "File exists", "out/report"))
        'file exists: out/report'
        >>> explain(ValueError("read_run: expected a run log, got a cake. Give a run log."))
        'expected a run log, got a cake. Give a run log.'
    """
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror[:1].lower()}{error.strerror[1:]}{where}"
    return " ".join(re.sub(r"^[a-z_]+( [a-z]+)?: ", "", str(error)).split())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="safestep",
        description="Step-size safety for PyTorch training.",
        epilog="safestep COMMAND --help tells a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"safestep {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, purpose) in COMMANDS.items():
        commands.add_parser(name, help=purpose)
    return parser


def _version() -> str:
    try:
        return metadata.version("safestep")
    except metadata.PackageNotFoundError:  # a bare checkout on the path
        return "of a checkout"
