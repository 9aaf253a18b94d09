"""Foreign text on a terminal and in logs."""

from __future__ import annotations

import io
import logging

import pytest

from ldm.terminal import escape_logs, printable, say

HOSTILE = "a\x1b]0;title\x07b\nldm: all is well\r\x9b2J\u202egnp.exe\u2028\udc80"


def test_foreign_text_is_one_printable_line() -> None:
    assert printable(HOSTILE) == r"a\x1b]0;title\x07b\nldm: all is well\r\x9b2J\u202egnp.exe\u2028\udc80"
    kept = "ein roter Kreis, 赤い輪, 👩‍👩‍👧 e\u0301"
    assert printable(kept) == kept


def test_what_is_said_keeps_its_own_lines_and_escapes_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"one\n\ttwo {HOSTILE}")
    assert capsys.readouterr().out == "one\n\ttwo " + printable(HOSTILE).replace(r"b\nldm", "b\nldm") + "\n"


def test_a_terminal_of_another_encoding_gets_escapes() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("赤", file=stream)
    stream.seek(0)
    assert stream.read() == "\\u8d64\n"


def test_arguments_of_log_messages_stay_on_one_line(caplog: pytest.LogCaptureFixture) -> None:
    factory = logging.getLogRecordFactory()
    try:
        escape_logs()
        logging.getLogger("ldm.test").warning("skipped %s\n%d of %.1f, %r", HOSTILE, 3, 2.5, "\x1b")
    finally:
        logging.setLogRecordFactory(factory)
    assert caplog.messages == ["skipped " + printable(HOSTILE) + "\n3 of 2.5, '\\x1b'"]
