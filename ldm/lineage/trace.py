"""From an image or a model back to what it was made from; each fingerprint that was recorded is compared with what is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ldm.data.latent_schema import latent_info, path_of
from ldm.data.manifest import LATENT_SHARDS, PackedFrom
from ldm.data.sources import ShardSource, open_source
from ldm.errors import LdmError, UsageError
from ldm.files import read_json, read_yaml, sha256_file
from ldm.inference.metadata import model_hash, read_metadata
from ldm.inference.settings import GenerationSettings
from ldm.lineage.finder import Finder, OtherError, kind_of
from ldm.lineage.node import Node, State
from ldm.lineage.samples import sample_uses
from ldm.models.adapter_file import ADAPTER_NAME, AdapterFile
from ldm.models.autoencoder import autoencoder_hash, load_autoencoder
from ldm.models.fingerprint import HALF_PRECISION
from ldm.models.matcher import INDEX_NAME, ImageTextModel, MatcherIndex
from ldm.models.text_encoder import TextEncoder
from ldm.pipeline import TEXT_PARTS, LatentDiffusionPipeline, ModelIndex, load_pipeline
from ldm.runs.layout import RunFolder, is_checkpoint, step_of
from ldm.runs.lineage import Lineage, history, initial_record, read_lineage, weights_hash
from ldm.runs.report import RunRecord

Check = Literal["recorded", "weights", "all"]
NOT_READ = "its weights were not read"
BEGAN = "the run began with its weights"
NOT_RECORDED = "no fingerprint of it was recorded"
# entries of the manifests of image shards, and of latents, that are shown
FACTS = (
    ("source", "image_size", "resize", "captioned"),
    ("resolution", "posterior", "flips", "captions", "dtype", "precision"),
)


class Tracer:
    """Follows records from one thing to the next. Each is shown once; later mentions refer to it."""

    def __init__(self, finder: Finder, check: Check = "weights", sample: str | None = None):
        """
        Args:
            finder: where to look for what a record names.
            check: compare the fingerprints that are recorded, also those of the networks' weights, or also the bytes of all
                shards.
            sample: a key; of every run that is met, say at which steps it was trained on.
        """
        self.finder, self.check, self.sample = finder, check, sample
        self._shown: set[tuple[str, str]] = set()
        self._texts: dict[str, bool] = {}  # by hash: text encoders that were looked at
        self._hash_of = cache(
            lambda folder: {autoencoder_hash(load_autoencoder(folder), dtype) for dtype in (None, *HALF_PRECISION)}
        )

    def trace(self, place: str) -> Node:
        """The tree of a PNG, a run, a checkpoint, a pipeline, a matcher, an autoencoder, or shards.

        Raises :class:`UsageError` for anything else.
        """
        path = Path(place)
        if path.is_file() and path.suffix.lower() == ".png":
            return self._image(path)
        if is_checkpoint(path) and path.exists():
            return self._run(path.absolute().parent.parent, step_of(path))
        kind = kind_of(path)
        if kind == "run":
            return self._run(path)
        if kind == "pipeline":
            return self._pipeline(path)
        if kind == "matcher":
            return self._matcher(path)
        if kind == "adapter" or (path.suffix == ".safetensors" and path.is_file()):
            return self._adapter(path)
        if kind == "autoencoder":
            return self._autoencoder(path)
        if kind == "shards" or "://" in place or path.suffix == ".tar":
            return self._shards(open_source(place), None)
        raise UsageError(
            f"{place} is nothing that can be traced; give a PNG that ldm sample wrote, or the folder of a pipeline, an "
            "adapter, a matcher, an autoencoder, a run, latents or image shards"
        )

    # -- images and models -----------------------------------------------------------------------------------------------

    def _image(self, path: Path) -> Node:
        settings, provenance = read_metadata(path)
        node = Node("image", str(path))
        if isinstance(settings, GenerationSettings):
            node.notes.append(
                f"{settings.prompt!r}, seed {settings.seed}, {settings.steps} steps, guidance {settings.guidance}"
            )
        else:
            node.notes.append(f"made of {len(settings)} images")
        node.notes.append(f"{provenance.scheduler}, {provenance.dtype} on {provenance.device}, ldm {provenance.ldm}")
        wanted, name = provenance.model_hash, provenance.model
        found = sorted(self.finder.folders["pipeline"], key=lambda folder: folder.name != name)
        same = next((folder for folder in found if self.check != "recorded" and _model_hash(folder) == wanted), None)
        if same is not None:
            child = self._pipeline(same)
            child.state = child.state or "checked"
            child.notes.insert(0, f"the model of the image ({wanted[:12]})")
        else:
            child = Node("pipeline", name, wanted)
            namesakes = ", ".join(str(folder) for folder in found if folder.name == name)
            looked = f"models of this name have other files now: {namesakes}" if namesakes else "no such model is here"
            child.leave_unchecked(
                f"{NOT_READ}; perhaps {namesakes}" if self.check == "recorded" and namesakes
                else f"{looked} (looked in {self.finder.shown}); give --search the folder that has it"
            )  # fmt: skip
        node.children.append(child)
        used = settings if isinstance(settings, Sequence) else [settings]
        for file in dict.fromkeys(file for each in used for file, _ in each.adapters()):
            node.children.append(self._find_adapter("unknown", file.removeprefix("sha256:")))
        return node

    def _find_adapter(self, name: str, expected: str) -> Node:
        """The adapter whose file has this sha256."""
        for folder in self.finder.folders["adapter"] if self.check != "recorded" else ():
            if sha256_file(folder / ADAPTER_NAME) == expected:
                node = self._adapter(folder)
                node.state = node.state or "checked"
                return node
        node = Node("adapter", name, expected)
        node.leave_unchecked(
            NOT_READ
            if self.check == "recorded"
            else f"it is not here; give --search the folder that has it ({self.finder.shown})"
        )
        return node

    def _adapter(self, path: Path) -> Node:
        adapter = AdapterFile.read(path)
        node = Node("adapter", str(path), sha256_file(adapter.path))
        if self._is_shown(node, adapter.path):
            return node
        node.notes.append(f"rank {adapter.rank}, {len(adapter.layers)} layers")
        if adapter.trigger_words:
            node.notes.append(f"trigger words: {', '.join(adapter.trigger_words)}")
        folder, record = adapter.path.parent, adapter.record
        lineage = read_lineage(folder) if adapter.path.name == ADAPTER_NAME else None
        if lineage is not None:
            self._compare(node, folder, lineage)
        elif record is not None:
            node.notes.append(f"of the base {record['base']['name']}, whose denoiser is {record['base']['hashes'][0][:12]}")
        self._add_origin(node, folder, lineage, self._run_of(folder, lineage))
        return node

    def _pipeline(self, path: Path) -> Node:
        index = read_json(path / "model_index.json", ModelIndex)
        node = Node("pipeline", str(path))
        if self._is_shown(node, path):
            return node
        load = load_pipeline if index.get("_class_name") == LatentDiffusionPipeline.__name__ else None
        return self._model(node, path, index.get("trained_on") or {}, load)

    def _matcher(self, path: Path) -> Node:
        node = Node("matcher", str(path))
        index = read_json(path / INDEX_NAME, MatcherIndex)
        return node if self._is_shown(node, path) else self._model(node, path, index["trained_on"], ImageTextModel.load)

    def _model(self, node: Node, path: Path, trained_on: Mapping[str, Any], load: Callable[[Path, str], object] | None) -> Node:
        """A model of latents with the networks that it was ``trained_on``; ``load`` compares these with their fingerprints."""
        lineage = self._lineage(node, path)
        state: State = "not checked"
        if self.check != "recorded" and load is not None:
            state = "checked"
            try:
                load(path, "cpu")
            except LdmError as error:
                state = "differs"
                node.notes.append(str(error))
        run = self._run_of(path, lineage)
        for what in ("autoencoder", *TEXT_PARTS):
            if (fingerprint := trained_on.get(what)) is None:
                continue
            part = Node(
                "autoencoder" if what == "autoencoder" else "text encoder", str(path / _folder(what)), fingerprint, state
            )
            if state == "checked":
                self._texts[fingerprint] = True
            if what == "autoencoder" and run is not None:
                self._add_autoencoder(part, self._config(run)["model"].get("autoencoder"), run)
            node.children.append(part)
        if not trained_on:
            node.notes.append("it does not say which autoencoder and text encoder it was trained with")
        self._add_origin(node, path, lineage, run)
        return node

    def _autoencoder(self, path: Path) -> Node:
        node = Node("autoencoder", str(path))
        if self.check != "recorded":
            node.fingerprint = autoencoder_hash(load_autoencoder(path))
            if (lineage := read_lineage(path)) is not None:
                node.set_state(weights_hash(path) == lineage["weights"], "its weights are others")
        self._add_origin(node, path)
        return node

    def _lineage(self, node: Node, path: Path) -> Lineage | None:
        """What a model's directory says of itself, compared with its weights."""
        lineage = read_lineage(path)
        if lineage is None:
            return None
        node.fingerprint = lineage["weights"]
        self._compare(node, path, lineage)
        return lineage

    def _compare(self, node: Node, path: Path, lineage: Lineage) -> None:
        merged = lineage.get("adapters")
        node.notes.append(f"with {len(merged)} merged adapters" if merged else f"after {lineage['step']:,} steps")
        if self.check == "recorded":
            node.leave_unchecked(NOT_READ)
        else:
            node.set_state(weights_hash(path) == lineage["weights"], f"its weights are others ({weights_hash(path)[:12]})")

    def _add_origin(self, node: Node, path: Path, lineage: Lineage | None = None, run: RunRecord | None = None) -> None:
        """The run that made a model; without it, what its directory says of the data."""
        if node.kind == "autoencoder" and (lineage := read_lineage(path)) is not None:
            node.notes.append(f"after {lineage['step']:,} steps")
        if (run := run or self._run_of(path, lineage)) is not None:
            child = self._run(run.folder, lineage["step"] if lineage else None)
            exported = [start["exported"]["weights"] for start in run.starts if "exported" in start][-1:]
            if not exported:
                child.leave_unchecked("by its config it exported this model; it has no record of the weights")
            elif self.check == "recorded":
                child.leave_unchecked(NOT_READ)
            else:
                child.set_state(weights_hash(path) in exported, f"it exported other weights ({exported[0][:12]})")
            node.children.append(child)
            return
        merged = lineage.get("adapters", []) if lineage else []
        if lineage and "initial" in lineage:
            what = "the adapters were merged into its weights" if merged else BEGAN
            node.children.append(self._initial(lineage["initial"]["name"], lineage["initial"]["weights"], path, what))
        for adapter in merged:
            node.children.append(self._find_adapter(adapter["name"], adapter["weights"]))
        for source in lineage["data"] if lineage and not merged else ():
            node.children.append(self._find_shards("", source["hash"], path))
        if merged:
            return
        if lineage or node.kind != "autoencoder":
            node.notes.append(
                f"no run in {self.finder.shown} exported it by itself; give --search the folder that has its run, or "
                "trace the run, where an export made the model of it"
            )

    def _run_of(self, model: Path, lineage: Lineage | None) -> RunRecord | None:
        """The run that exported a model: by its weights, else by the path of its export."""
        named, place = None, os.path.realpath(model)
        for folder in dict.fromkeys((model.absolute().parent, *self.finder.folders["run"])):
            if kind_of(folder) != "run":
                continue
            try:
                run = RunRecord.read(folder)
            except LdmError:
                continue
            exported = [start["exported"]["weights"] for start in run.starts if "exported" in start]
            if lineage is not None and lineage["weights"] in exported:
                return run
            if named is None and place in {os.path.realpath(each) for each in self.finder.places(str(run.artifact), folder)}:
                named = run
        return named

    def _add_autoencoder(self, part: Node, name: Any, run: RunRecord) -> None:
        """The directory that a pipeline's autoencoder was copied from, and its run."""
        if isinstance(name, str) and (found := self._find_autoencoder(name, part.fingerprint, run.folder)) is not None:
            part.name = str(found)
            if not self._is_shown(part, found):
                self._add_origin(part, found)

    def _find_autoencoder(self, name: str, expected: str, near: Path) -> Path | None:
        """The autoencoder with a fingerprint. Weights that may not be read count as those that are recorded there."""
        here = [Path(place) for place in self.finder.places(name, near) if kind_of(Path(place)) is not None] if name else []
        for folder in dict.fromkeys((*here, *self.finder.folders["autoencoder"])):
            if self.check == "recorded" and folder in here:
                return folder
            try:
                if self.check != "recorded" and expected in self._hash_of(folder):
                    return folder
            except LdmError:
                continue
        return None

    # -- runs ------------------------------------------------------------------------------------------------------------

    def _config(self, run: RunRecord) -> dict[str, Any]:
        return read_yaml(RunFolder(run.folder).config, dict[str, Any])

    def _run(self, folder: Path, steps: int | None = None) -> Node:
        """A run up to a step (default: all)."""
        node = Node("run", str(folder))
        if self._is_shown(node, folder):
            return node
        run = RunRecord.read(folder)
        steps = run.step if steps is None else steps
        config, trained = self._config(run), history(run.starts, steps)
        node.notes.append(
            f"ldm {run.stage} fit: {steps:,} steps, starts: {len(run.starts)}, seed {config.get('seed_everything')}"
        )
        if trained and trained[0][0].start:
            node.notes.append(f"its first {trained[0][0].start:,} steps were trained elsewhere")
        model = config["model"]
        section = model.get("autoencoder") if run.stage == "autoencoder" else model
        initial = section.get("init_from") if isinstance(section, dict) else None
        if isinstance(initial, str):
            records = [start["initial"]["weights"] for start in run.starts if "initial" in start]
            node.children.append(self._initial(initial, records[-1] if records else None, folder))
        if run.stage != "autoencoder" and model.get("online"):
            self._add_online(node, model, run)
        recorded = {
            (each["path"], each["hash"]): each for _, start in trained if "data" in start for each in start["data"]["sources"]
        }
        given = run.config.get("data", {}).get("train", [])
        names = [(given, None)] if isinstance(given, str) else [(each["path"], None) for each in given]
        for name, expected in recorded or names:
            child = self._find_shards(name, expected, folder)
            if not child.state:
                child.leave_unchecked(NOT_RECORDED)
            node.children.append(child)
        if self.sample is not None:
            try:
                node.uses = sample_uses(
                    run, self.sample, steps, lambda name, expected: self.finder.shards(name, expected, folder)
                )
            except LdmError as error:
                node.notes.append(f"sample {self.sample}: {error}")
        return node

    def _add_online(self, node: Node, model: dict[str, Any], run: RunRecord) -> None:
        """The networks of a run that encodes images itself; their fingerprints are in its checkpoints and pipelines."""
        for place in self.finder.places(str(model["autoencoder"]), run.folder):
            if kind_of(Path(place)) is not None:
                child = Node("autoencoder", place)
                if not self._is_shown(child, Path(place)):
                    self._add_origin(child, Path(place))
                node.children.append(child)
                return

    def _initial(self, name: str, expected: str | None, near: Path, what: str = BEGAN) -> Node:
        """What a run began with, or, as ``what`` says, what else was made of its weights."""
        named = [place for place in map(Path, self.finder.places(name, near)) if place.exists()]
        reads = expected is not None and self.check != "recorded"
        others = self.finder.folders["pipeline"] if reads else ()
        place = next((place for place in (*named, *others) if reads and _weights_of(place) == expected), None)
        if place is None and not named:
            node = Node("network", name, expected or "")
            node.leave_unchecked(f"{what}; it is not here")
            return node
        shown = place or named[0]
        node = self.trace(str(shown)) if is_checkpoint(shown) or kind_of(shown) else Node("network", str(shown))
        node.notes.insert(0, what)
        if reads:
            node.set_state(place is not None, "its weights are others now")
        else:
            node.leave_unchecked(NOT_RECORDED if expected is None else NOT_READ)
        return node

    # -- data ------------------------------------------------------------------------------------------------------------

    def _find_shards(self, name: str, expected: str | None, near: Path) -> Node:
        try:
            return self._shards(self.finder.shards(name, expected, near), expected)
        except LdmError as error:
            node = Node(
                "shards", name or "unknown", expected or "", "differs" if isinstance(error, OtherError) else "not checked"
            )
            node.notes.append(str(error))
            return node

    def _shards(self, source: ShardSource, expected: str | None) -> Node:
        manifest, is_latents = source.manifest, source.manifest.format == LATENT_SHARDS
        node = Node("latents" if is_latents else "image shards", source.spec, manifest.hash)
        if expected is not None:
            node.state = "checked"  # or it would not have been found
        if self._is_shown(node, source.spec if source.is_remote else os.path.abspath(source.spec)):
            return node
        node.notes.append(f"{manifest.samples:,} samples in {len(manifest.shards):,} shards")
        facts = {name: manifest.extra[name] for name in FACTS[is_latents] if name in manifest.extra}
        node.notes.append(", ".join(f"{name}: {value}" for name, value in facts.items()))
        try:
            source.check_cheap()
            if self.check == "all":
                _require_bytes(source)
            if is_latents:
                self._add_latents(node, source)
        except LdmError as error:
            node.set_state(False, str(error))
        if manifest.packed_from is not None:
            node.children.append(self._packed_from(manifest.packed_from, source))
        return node

    def _packed_from(self, record: PackedFrom, shards: ShardSource) -> Node:
        """What image shards were packed from, of which tables alone have a fingerprint."""
        place = path_of(shards, record["path"])
        node = Node("images", place, notes=[] if os.path.lexists(place) else [f"not here: {place}"])
        for table in record["tables"]:
            child = Node("table", path_of(shards, table["path"]), table["sha256"])
            if self.check == "recorded":
                child.leave_unchecked("it was not read")
            else:
                try:
                    child.set_state(sha256_file(child.name) == table["sha256"], "it has changed since")
                except (LdmError, OSError) as error:
                    child.leave_unchecked(str(error))
            node.children.append(child)
        return node

    def _add_latents(self, node: Node, source: ShardSource) -> None:
        """What latents were made from, by their manifest."""
        info, near = latent_info(source), Path(os.path.abspath(source.spec))
        autoencoder = Node("autoencoder", "unknown", info.autoencoder)
        if (found := self._find_autoencoder("", info.autoencoder, near)) is not None:
            autoencoder.name, autoencoder.state = str(found), "checked"
            if not self._is_shown(autoencoder, found):
                self._add_origin(autoencoder, found)
        elif ("autoencoder", info.autoencoder) in self._shown:
            autoencoder.name, autoencoder.state = "above", "checked"
        else:
            why = NOT_READ if self.check == "recorded" else f"no autoencoder of this fingerprint is in {self.finder.shown}"
            autoencoder.leave_unchecked(why)
        node.children.append(autoencoder)
        for text in info.text_encoders:
            place = text.name if text.folder is None else path_of(source, text.folder)
            child = Node("text encoder", place, text.hash)
            if self.check == "recorded":
                child.leave_unchecked(NOT_READ)
            elif self._texts.get(text.hash):
                child.state = "checked"
            else:
                try:
                    child.set_state(TextEncoder.load(place).hash == text.hash, "it is another one now")
                except LdmError as error:
                    child.leave_unchecked(str(error))
            node.children.append(child)
        node.children.append(self._find_shards(path_of(source, info.source_shards), info.source, near))

    def _is_shown(self, node: Node, place: object) -> bool:
        """Whether a thing was shown before, which is then said; else it counts as shown."""
        key = (node.kind, os.path.realpath(str(place)))
        if key in self._shown:
            node.notes.append("see above")
            return True
        self._shown.add(key)
        return False


def _folder(part: str) -> str:
    return "vae" if part == "autoencoder" else part


def _model_hash(folder: Path) -> str | None:
    try:
        return model_hash(folder)
    except (LdmError, OSError):
        return None


def _weights_of(place: Path) -> str | None:
    try:
        return initial_record(str(place))["weights"]
    except LdmError:
        return None


def _require_bytes(source: ShardSource) -> None:
    """Raise :class:`LdmError` naming the first shard whose bytes are not those of the manifest."""
    for number, entry in enumerate(source.manifest.shards):
        if sha256_file(source.path(number)) != entry.sha256:
            raise LdmError(f"{source.name(number)} has other bytes than its manifest says")
