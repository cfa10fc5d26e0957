"""How commands are declared: each with its function, its help and ``--json``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from lepton_ray.cli.terminal import Terminal

Call = Callable[[argparse.Namespace, Terminal], dict[str, Any]]


class Commands:
    """The commands of a parser.

    A command's function gets the options and the terminal, tells a person what it did there, and
    returns the same as plain values for ``--json``.
    """

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(self, name: str, call: Call, text: str) -> argparse.ArgumentParser:
        """A command; the parser to add its arguments to."""
        command = self._parsers.add_parser(name, help=text, description=text)
        command.set_defaults(call=call)
        command.add_argument("--json", action="store_true", help="print one JSON object only")
        return command

    def add_on_file(self, name: str, call: Call, text: str) -> argparse.ArgumentParser:
        """A command on an experiment file, with ``--set``."""
        command = self.add(name, call, text)
        command.add_argument("file", metavar="FILE", help="the experiment")
        add_settings(command, "train.epochs=3")
        return command


def add_settings(command: argparse.ArgumentParser, example: str) -> None:
    """The argument of every command that takes an experiment, by its file or by its model."""
    command.add_argument(
        "--set",
        dest="settings",
        metavar="PATH=VALUE",
        action="append",
        default=[],
        help=f"change a setting, as in {example} (may be repeated)",
    )


def add_address(command: argparse.ArgumentParser) -> None:
    """The argument of every command that runs on Ray."""
    command.add_argument("--address", help="Ray cluster; default RAY_ADDRESS or an embedded one")


def count(text: str) -> int:
    """An argument of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
