"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        state: fail where training cannot go on with it.
        said: what was found.
        mend: what to do about it.
    """

    name: str
    state: Literal["ok", "warn", "fail"]
    said: str
    mend: str = ""
