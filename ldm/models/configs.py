"""Networks that others may have saved: their configs are read and bounded before a library builds anything from them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldm.errors import LdmError, UsageError, first_line
from ldm.files import MAX_JSON_BYTES, read_bytes

# part of a setting's name -> the most that it may be: a network of a million layers is built for hours before it fails
LIMITS = {"layers": 1000, "num_train_timesteps": 100_000}


def read_config(path: str | Path) -> dict[str, Any]:
    """The config of a network or scheduler. Raises :class:`LdmError`, naming file and setting, for no JSON object, or a number
    of layers or timesteps above :data:`LIMITS`."""
    try:
        config = json.loads(read_bytes(path, MAX_JSON_BYTES, "restore the file"))  # of any Python program, which may write NaN
    except (ValueError, RecursionError) as error:
        raise LdmError(f"{path} is not readable JSON ({first_line(error)}); restore the file") from None
    if not isinstance(config, dict):
        raise LdmError(f"{path} is no JSON object; restore the file")
    for key, value in config.items():
        limit = next((limit for part, limit in LIMITS.items() if part in key), None)
        numbers = [*value] if isinstance(value, list) else [value]
        if limit is not None and any(isinstance(number, (int, float)) and number > limit for number in numbers):
            raise LdmError(f"{path}: {key} is {max(numbers)}, above the limit of {limit:,}; restore the file")
    return config


@contextlib.contextmanager
def loading(what: str, fix: str) -> Iterator[None]:
    """Make a :class:`UsageError` of whatever a library raises on files that it did not expect: ``what`` (reason); ``fix``."""
    try:
        yield
    except (LdmError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers' panics are no Exception
        raise UsageError(f"{what} ({first_line(error)}); {fix}") from error
