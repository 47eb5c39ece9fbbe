"""The command ``safestep``; a sub-command is a module with two functions.

``add_arguments(parser)`` adds its options, ``run(arguments)`` returns its exit status. A module is
imported only when its sub-command is asked for.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {  # name: module, what it does
    "demo": ("safestep.demo.command", "watch a run that plain Adam loses and safestep saves"),
    "report": ("safestep.report.write", "turn the logs of runs into figures and one page"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after ``safestep``; by default those of the process.

    Returns:
        Exit status.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    chosen = _parser().parse_args(words[:1]).command
    module_name, purpose = COMMANDS[chosen]
    module = import_module(module_name)
    parser = argparse.ArgumentParser(
        prog=f"safestep {chosen}", description=f"{purpose[0].upper()}{purpose[1:]}."
    )
    module.add_arguments(parser)
    return module.run(parser.parse_args(words[1:]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="safestep",
        description="Step-size safety for PyTorch training.",
        epilog="safestep COMMAND --help tells a command's options.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, purpose) in COMMANDS.items():
        commands.add_parser(name, help=purpose)
    return parser
