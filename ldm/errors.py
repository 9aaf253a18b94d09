"""Errors that a user can fix: one line that names the thing (file, key) and the fix.

The command line prints such an error as that one line and exits with its ``exit_code``; any other exception is a bug and keeps
its traceback.
"""

from __future__ import annotations


class LdmError(Exception):
    """Work failed for a reason that the user can fix. Exit code 1."""

    exit_code = 1


class UsageError(LdmError):
    """The request itself is invalid (arguments, config, prompt). Exit code 2."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, for errors that quote another library."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# torch's CPU allocator, CUDA, cuBLAS's workspace; the threads of a process without memory for their stacks
OUT_OF_MEMORY = ("allocate memory", "out of memory", "STATUS_ALLOC_FAILED", "can't start new thread")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the machine ran out of memory. For CPU tensors torch raises a plain RuntimeError."""
    if isinstance(error, RuntimeError):
        return type(error).__name__ == "OutOfMemoryError" or any(sign in str(error) for sign in OUT_OF_MEMORY)
    return isinstance(error, MemoryError)
