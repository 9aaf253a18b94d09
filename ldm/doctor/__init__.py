"""``ldm doctor``: checks whether this machine can train, and says how to fix what is wrong."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        found: what the check saw.
        fix: what to do about it; empty where nothing is wrong.
        failed: whether training cannot work until it is fixed.
    """

    name: str
    found: str
    fix: str = ""
    failed: bool = False

    @property
    def state(self) -> str:
        """``ok``, ``warn`` or ``fail``."""
        return "fail" if self.failed else "warn" if self.fix else "ok"
