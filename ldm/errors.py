"""Errors that a user can mend: one line that names the thing (file, key) and the mend.

The command line prints such an error as that one line and leaves with its ``exit_code``; anything else is a
defect of ours and keeps its traceback.
"""

from __future__ import annotations


class LdmError(Exception):
    """Work that failed for a reason the user can see to. Exit code 1."""

    exit_code = 1


class UsageError(LdmError):
    """A request that cannot be carried out as it was made (arguments, config, prompt). Exit code 2."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """What an exception says, in one line: for messages that pass on another library's complaint."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
