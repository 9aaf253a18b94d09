"""The names in a run's folder: in one file of the code, and read back as they are written."""

import re
from pathlib import Path

import pytest

import ldm
from ldm.runs.layout import RunFolder, checkpoint_name, checkpoints_in, step_of

LAYOUT = Path("runs", "layout.py")
# joined to a path, or a path within the folder; alone they are also sections of the config and rows of tables
NAMES = re.compile(
    r'/ "(logs|previews|checkpoints)"|"[^"`]*\b(metrics\.csv|run\.log|environment\.json|last\.ckpt|best\.ckpt|step=\{)[^"`]*"'
)
ELSEWHERE = {"doctor/installed.py"}  # torch's own cache has a folder of checkpoints


def test_no_other_file_spells_out_a_name_of_the_run_folder() -> None:
    root = Path(ldm.__file__).parent
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in sorted(root.rglob("*.py"))
        if path.relative_to(root) != LAYOUT and path.relative_to(root).as_posix() not in ELSEWHERE
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if NAMES.search(line)
    ]
    assert found == []


def test_checkpoints_and_previews_come_in_the_order_of_their_steps(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.previews() == [] == checkpoints_in(run.checkpoints_folder)
    run.checkpoints_folder.mkdir()
    run.previews_folder.mkdir()
    for step in (100_000_000, 5, 12):
        run.preview(step).touch()
        (run.checkpoints_folder / checkpoint_name(step)).touch()
    for other in (".step=00000007.ckpt.1.tmp", "step=00000005.ckpt.sha256", "last.ckpt"):
        (run.checkpoints_folder / other).touch()
    assert [step for step, _ in run.previews()] == [5, 12, 100_000_000]
    assert [step_of(path) for path in checkpoints_in(run.checkpoints_folder)] == [5, 12, 100_000_000]
    with pytest.raises(ValueError, match=r"last\.ckpt"):
        step_of(run.last_checkpoint)
