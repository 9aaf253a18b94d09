"""What the commands' parsers have in common, and a table for what they print."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence

from ldm.errors import UsageError

Commands = argparse._SubParsersAction


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, as every other error of ours."""

    def error(self, message: str) -> None:
        raise UsageError(f"{message}; see {self.prog} --help")


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], None], description: str, example: str
) -> Parser:
    """A command that ``run`` carries out."""
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
    """A word that commands stand behind: ``ldm shards pack``."""
    return commands.add_parser(name, help=description).add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)


def print_table(rows: Mapping[str, Sequence[str]], *columns: str) -> None:
    """A table with a name at the head of each row and each column."""
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", *columns)
    for name, figures in rows.items():
        table.add_row(name, *figures)
    Console().print(table)
