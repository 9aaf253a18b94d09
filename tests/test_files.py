"""Format versions."""

from __future__ import annotations

import pytest

from ldm.errors import LdmError
from ldm.files import require_version


def test_an_older_format_and_one_without_a_version_are_read() -> None:
    for found in (None, 0, 1, 2):
        require_version(found, 2, "shards/manifest.json: the manifest")


def test_a_newer_format_is_refused_by_name_with_the_fix() -> None:
    said = r"shards/manifest\.json: the manifest has format version 3\b.*up to 2\b.*newer ldm"
    with pytest.raises(LdmError, match=said) as refused:
        require_version(3, 2, "shards/manifest.json: the manifest")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("found", ["2", 1.0, True, -1, []])
def test_an_invalid_version_is_refused(found: object) -> None:
    with pytest.raises(LdmError, match="not a whole number"):
        require_version(found, 2, "run.json")
