"""What the command line prints, with foreign text made harmless.

File names, captions, tar keys and messages of other libraries are untrusted. A terminal obeys the control characters in them:
they set its title, move the cursor, or forge a line of a log. So they are printed as escapes, such as ``\\x1b``.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import Any, TextIO

# C0 and C1 controls, line and paragraph separators, marks that reorder text, halves of surrogate pairs
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_UNSAFE_IN_LINES = re.compile(_UNSAFE.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def printable(text: object) -> str:
    """``text`` on one line, with every control character escaped: for foreign text inside a message."""
    return _UNSAFE.sub(_escape, str(text))


def say(text: object = "", file: TextIO | None = None, end: str = "\n") -> None:
    """Print ``text``; its newlines and tabs stay, other control characters are escaped.

    Pass foreign text through :func:`printable` first, else a newline in it begins a line of its own.

    Args:
        file: standard output by default.
    """
    stream = sys.stdout if file is None else file
    line = _UNSAFE_IN_LINES.sub(_escape, str(text)) + end
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(line.encode(encoding, "backslashreplace").decode(encoding))  # a terminal of another encoding
    stream.flush()


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        args: Any = self.args
        if isinstance(args, tuple):
            args = tuple(arg if isinstance(arg, int | float) else _Printed(arg) for arg in args)
        return _UNSAFE_IN_LINES.sub(_escape, str(self.msg) % args if args else str(self.msg))


class _Printed:
    """An argument of a log message, whose text is escaped."""

    def __init__(self, value: object):
        self.value = value

    def __str__(self) -> str:
        return printable(self.value)

    def __repr__(self) -> str:
        return printable(repr(self.value))


def escape_logs() -> None:
    """Escape control characters in what is logged from now on. Arguments of a message stay on one line."""
    logging.setLogRecordFactory(_Record)
