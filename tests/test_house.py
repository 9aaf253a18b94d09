"""The floors of the README's tree: a file imports only from floors below its own, or from its own box; no circles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ldm

ROOT = Path(ldm.__file__).parent

GROUND = {"ldm.errors", "ldm.files", "ldm.progress", "ldm.machine"}
# box -> floor; a box is a file, or a folder whose files may import one another
BOXES = {
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
    "ldm.doctor": 5,
    "ldm.quickstart": 5,
    "ldm.cli": 6,  # the only one that knows quickstart too
}
EXEMPT = {"ldm", "ldm.__main__"}


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(tree):
    """Every module that a file imports when it runs, inside functions too; those for type hints alone do not count."""
    found = set()
    todo = [tree]
    while todo:
        node = todo.pop()
        if is_type_checking(node):
            todo.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) | ({node.module} if names - MODULES.keys() else set())
        todo.extend(ast.iter_child_nodes(node))
    return found


IMPORTS = {name: imports(ast.parse(path.read_text())) for name, path in MODULES.items()}
OURS = {name: {other for other in found if other.split(".")[0] == "ldm"} for name, found in IMPORTS.items()}


def box_of(module):
    return next((box for box in BOXES if module == box or module.startswith(box + ".")), None)


def floor_of(module):
    return -1 if module in GROUND else BOXES[box_of(module)]


def may_import(module, other):
    if other == "ldm":
        return BOXES.get(box_of(module), -1) >= 3  # it knows the pipeline: for the top floor alone
    if module in GROUND:
        return other in GROUND
    return box_of(module) == box_of(other) or floor_of(other) < floor_of(module)


def test_the_reader_of_imports_sees_functions_and_skips_type_hints():
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


def test_the_rule_itself():
    assert may_import("ldm.data.latent_schema", "ldm.data.shards") and may_import("ldm.data.latent_schema", "ldm.files")
    assert not may_import("ldm.data.latent_schema", "ldm.models.text_encoder") and not may_import("ldm.losses", "ldm.pipeline")
    assert not may_import("ldm.pipeline", "ldm.evaluation.reconstruction") and not may_import("ldm.files", "ldm.losses")
    assert may_import("ldm.cli", "ldm.quickstart") and not may_import("ldm.quickstart", "ldm.cli")


def test_every_file_stands_on_a_floor():
    assert [name for name in MODULES if name not in EXEMPT | GROUND and box_of(name) is None] == []
    assert MODULES.keys() >= GROUND
    # and every box of the table is there
    assert {box_of(name) for name in MODULES} >= BOXES.keys()


def test_every_import_of_ours_exists():
    assert {name: others - MODULES.keys() for name, others in OURS.items() if others - MODULES.keys()} == {}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - EXEMPT))
def test_a_file_imports_only_from_below(module):
    wrong = sorted(other for other in OURS[module] if not may_import(module, other))
    assert not wrong, f"{module} must not import {', '.join(wrong)}"


def test_there_are_no_circles():
    graph = {name: others - {"ldm", name} for name, others in OURS.items() if name not in EXEMPT}
    assert set(TopologicalSorter(graph).static_order()) >= graph.keys()  # raises CycleError


def packages(module):
    return {name.split(".")[0] for name in IMPORTS[module]}


def test_lightning_stays_in_training_and_above():
    below = [name for name in MODULES.keys() - EXEMPT if floor_of(name) <= 2]
    knowing = {name for name in below if packages(name) & {"lightning", "pytorch_lightning"}}
    assert knowing == {"ldm.data.datamodule"}


def test_data_knows_no_models():
    models = {"transformers", "diffusers", "lpips", "torchmetrics"}
    assert {name: packages(name) & models for name in MODULES if box_of(name) == "ldm.data" and packages(name) & models} == {}


def test_the_tree_of_the_readme_shows_every_room():
    readme = (ROOT.parent / "README.md").read_text()
    rooms = [box.removeprefix("ldm.") for box in BOXES] + [name.removeprefix("ldm.") for name in GROUND]
    assert [room for room in rooms if room not in readme[readme.index("ldm/\n") :]] == []


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
