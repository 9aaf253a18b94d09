"""The commands' argument parsers, and a table for what they print."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from ldm.errors import UsageError
from ldm.terminal import printable

Commands = argparse._SubParsersAction


class Parser(argparse.ArgumentParser):
    """argparse that raises its errors as :class:`UsageError`.

    Attributes:
        passes_on: tells of the name of an option whether it is one of another parser's; ``passed_on`` of the parsed options
            holds these, each as ``--name=value``.
    """

    passes_on: Callable[[str], bool] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.passes_on is None or args is None:
            return super().parse_known_args(args, namespace)
        own: list[str] = []
        passed_on: list[str] = []
        words = iter(args)
        for word in words:
            name, equals, _ = word.partition("=")
            if not self.passes_on(name):
                own.append(word)
            elif equals:
                passed_on.append(word)
            elif (value := next(words, None)) is not None:
                passed_on.append(f"{word}={value}")
            else:
                self.error(f"{word} has no value")
        namespace, rest = super().parse_known_args(own, namespace)
        namespace.passed_on = passed_on
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], None], description: str, example: str
) -> Parser:
    """Add a command; ``run`` receives its parsed options."""
    added = commands.add_parser(
        name,
        help=description,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added.set_defaults(run=run)
    return added


def add_group(commands: Commands, name: str, description: str) -> Commands:
    """Add a group of commands, such as ``ldm shards``."""
    return commands.add_parser(name, help=description).add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)


def add_force(parser: argparse._ActionsContainer) -> None:
    """The option that takes adapters of another base."""
    parser.add_argument(
        "--force", action="store_true", help="take adapters that were trained on another base of the same architecture"
    )


def print_table(rows: Mapping[str, Sequence[str]], *columns: str, first: str = "metric") -> None:
    """Print rows of values by their name, under a header: what these names are, and the names of the columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in (first, *columns):
        table.add_column(Text(printable(name)))  # Text, because rich would interpret brackets as markup
    for name, values in rows.items():
        table.add_row(*(Text(printable(cell)) for cell in (name, *values)))
    Console().print(table)
