"""Layers of the package: a file imports only from rooms below its own, or from its own room; no circular imports."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TypeGuard

import pytest

import ldm

ROOT = Path(ldm.__file__).parent

GROUND = {"ldm.errors", "ldm.files", "ldm.images", "ldm.locks", "ldm.machine", "ldm.progress", "ldm.terminal"}
# room -> floor; a room is a file, or a folder whose files may import one another
ROOMS = {
    "ldm.diffusion": 0,
    "ldm.models": 0,
    "ldm.losses": 0,
    "ldm.data": 0,
    "ldm.reporting": 0,
    "ldm.shapes": 1,
    "ldm.pipeline": 1,
    "ldm.latents": 1,
    "ldm.evaluation": 2,
    "ldm.inference": 2,
    "ldm.training": 3,
    "ldm.serve": 3,
    "ldm.runs": 4,
    "ldm.ablation": 5,
    "ldm.doctor": 5,
    "ldm.lineage": 5,
    "ldm.quickstart": 5,
    "ldm.cli": 6,  # also imports quickstart and doctor
}
EXEMPT = {"ldm", "ldm.__main__"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def is_type_checking(node: ast.AST) -> TypeGuard[ast.If]:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(tree: ast.AST) -> set[str]:
    """Every module that a file imports at run time, inside functions too; imports for type hints do not count."""
    found: set[str] = set()
    todo = [tree]
    while todo:
        node = todo.pop()
        if is_type_checking(node):
            todo.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) | ({node.module} if names - MODULES.keys() else set())
        todo.extend(ast.iter_child_nodes(node))
    return found


IMPORTS = {name: imports(ast.parse(path.read_text())) for name, path in MODULES.items()}
OURS = {name: {other for other in found if other.split(".")[0] == "ldm"} for name, found in IMPORTS.items()}


def room_of(module: str) -> str | None:
    return next((room for room in ROOMS if module == room or module.startswith(room + ".")), None)


def floor_of(module: str) -> int:
    return -1 if module in GROUND else ROOMS[room_of(module) or ""]


def may_import(module: str, other: str) -> bool:
    if other == "ldm":
        return floor_of(module) >= 3  # it imports the pipeline
    if module in GROUND:
        return other in GROUND
    return room_of(module) == room_of(other) or floor_of(other) < floor_of(module)


def test_imports_in_functions_count_and_those_for_type_hints_do_not():
    source = """
import lightning.pytorch
from ldm.models import dit
from ldm.errors import UsageError
if TYPE_CHECKING:
    from ldm.pipeline import LatentDiffusionPipeline
else:
    import numpy
def f():
    from ldm.cli import main
"""
    assert imports(ast.parse(source)) == {"lightning.pytorch", "ldm.models.dit", "ldm.errors", "numpy", "ldm.cli"}


def test_the_rule():
    assert may_import("ldm.data.latent_schema", "ldm.data.shards") and may_import("ldm.data.latent_schema", "ldm.files")
    assert not may_import("ldm.data.latent_schema", "ldm.models.text_encoder") and not may_import("ldm.losses", "ldm.pipeline")
    assert not may_import("ldm.pipeline", "ldm.evaluation.reconstruction") and not may_import("ldm.files", "ldm.losses")
    assert may_import("ldm.cli", "ldm.quickstart") and not may_import("ldm.quickstart", "ldm.cli")


def test_every_file_has_a_room():
    assert [name for name in MODULES if name not in EXEMPT | GROUND and room_of(name) is None] == []
    assert MODULES.keys() >= GROUND
    assert {room_of(name) for name in MODULES} >= ROOMS.keys()


def test_every_import_of_ours_exists():
    assert {name: others - MODULES.keys() for name, others in OURS.items() if others - MODULES.keys()} == {}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - EXEMPT))
def test_a_file_imports_only_from_below(module):
    wrong = sorted(other for other in OURS[module] if not may_import(module, other))
    assert not wrong, f"{module} must not import {', '.join(wrong)}"


def test_there_are_no_circular_imports():
    graph = {name: others - {"ldm", name} for name, others in OURS.items() if name not in EXEMPT}
    assert set(TopologicalSorter(graph).static_order()) >= graph.keys()  # raises CycleError


def packages(module: str) -> set[str]:
    return {name.split(".")[0] for name in IMPORTS[module]}


def test_lightning_stays_in_training_and_above():
    below = [name for name in MODULES.keys() - EXEMPT if floor_of(name) <= 2]
    importing = {name for name in below if packages(name) & {"lightning", "pytorch_lightning"}}
    assert importing == {"ldm.data.datamodule"}


def test_data_imports_no_models():
    models = {"transformers", "diffusers", "lpips", "torchmetrics"}
    assert {name: packages(name) & models for name in MODULES if room_of(name) == "ldm.data" and packages(name) & models} == {}


def test_the_tree_of_the_readme_shows_every_room():
    readme = (ROOT.parent / "README.md").read_text()
    rooms = [room.removeprefix("ldm.") for room in ROOMS] + [name.removeprefix("ldm.") for name in GROUND]
    assert [room for room in rooms if room not in readme[readme.index("ldm/\n") :]] == []


# what only one file may call, because that file makes it safe for foreign files and foreign text
GUARDED = {"Image.open": "ldm.images", "print": "ldm.terminal", "np.memmap": "", "mmap.mmap": "", "torch.from_file": ""}


def test_images_are_opened_and_text_is_printed_in_one_file_and_nothing_is_mapped():
    calls = {
        (name, ast.unparse(node.func))
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    }
    assert {(name, called) for name, called in calls if GUARDED.get(called, name) != name} == set()


def test_private_parts_of_lightning_are_used_in_one_file():
    import lightning
    import lightning.pytorch as package

    names = set()
    for folder in {Path(lightning.__file__).parent, Path(package.__file__).parent}:
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    names.add(node.attr)
                elif isinstance(node, ast.FunctionDef):
                    names.add(node.name)
    private = {name for name in names if name.startswith("_") and not name.startswith("__")}
    found = {}
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
        uses = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        }
        if uses & private - own and module != "ldm.runs.lightning_private":
            found[module] = uses & private - own
    assert found == {}
