"""The tree that ``ldm trace`` prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.text import Text
from rich.tree import Tree

from ldm.lineage.samples import SampleUses
from ldm.terminal import printable

State = Literal["", "checked", "not checked", "differs"]
STYLES: dict[State, str] = {"": "", "checked": "green", "not checked": "yellow", "differs": "bold red"}
SHOWN_STEPS = 20


@dataclass
class Node:
    """One thing and what it was made from.

    Attributes:
        kind: ``image``, ``pipeline``, ``run``, ``latents``, ...
        name: where it is, or what is known of its name.
        fingerprint: that was recorded of it, or that it has; "" for none.
        state: whether it has the fingerprint that was recorded; "" where there is nothing to compare.
        notes: lines about it, with the reason of its state.
        uses: how a run trained on the sample that is asked for.
        children: what it was made from.
    """

    kind: str
    name: str
    fingerprint: str = ""
    state: State = ""
    notes: list[str] = field(default_factory=list)
    uses: list[SampleUses] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)

    def set_state(self, same: bool, what: str = "") -> None:
        """Say whether the fingerprint is the recorded one; ``what`` it is where it is not."""
        self.state = "checked" if same else "differs"
        if not same and what:
            self.notes.append(what)

    def leave_unchecked(self, why: str) -> None:
        self.state = "not checked"
        self.notes.append(why)

    def walk(self) -> Iterator[Node]:
        """This node and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def tree(self) -> Tree:
        """For rich: a line for each thing, with its notes below it."""
        line = Text.assemble((self.kind, "bold"), " ", printable(self.name))
        if self.fingerprint:
            line.append(f" {printable(self.fingerprint)[:12]}", "cyan")
        if self.state:
            line.append(f" {self.state}", STYLES[self.state])
        for note in filter(None, [*self.notes, *map(_shown, self.uses)]):
            line.append(f"\n{printable(note)}", "dim")
        tree = Tree(line)
        for child in self.children:
            tree.add(child.tree())
        return tree


def _shown(uses: SampleUses) -> str:
    steps = [*dict.fromkeys(uses.steps)]
    listed = ", ".join(map(str, steps[:SHOWN_STEPS])) + (f" and {len(steps) - SHOWN_STEPS} more" * (len(steps) > SHOWN_STEPS))
    said = f"sample {uses.key} of {uses.shard}: trained on {len(uses.steps)} times" + (f", at steps {listed}" if steps else "")
    skipped = f"; {len(uses.skipped)} times in a step that was skipped" if uses.skipped else ""
    return said + skipped + (f"; it {uses.reason}" if uses.reason else "")
