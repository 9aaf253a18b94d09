"""An HTML page about a run, made from the files in its folder, while the run trains or afterwards.

No checkpoint is read and no network built, so that a training run is not slowed down.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from ldm.data.quarantine import BadSample, read_quarantine
from ldm.files import MAX_YAML_BYTES, open_regular, read_bytes
from ldm.progress import duration
from ldm.reporting.grids import captioned_grid, paired_grid, read_grid
from ldm.reporting.metrics_csv import Curves, read_metrics
from ldm.reporting.pages import Report
from ldm.runs.layout import RunConfig, RunFolder, Start

# A run counts as stopped when it has written nothing for so many seconds, and for the time of so many rows of metrics.
SILENT_SECONDS, SILENT_ROWS = 600, 10
# rows of metrics that the time left is estimated from
RECENT_ROWS = 20
LOG_LINES, LOG_BYTES = 40, 64 * 1024
STRIP_ROWS, STRIP_IMAGES, STRIP_CELL = 8, 6, 110
SHOWN_QUARANTINED = 8

TITLES = {
    "autoencoder": "Stage one: autoencoder",
    "denoiser": "Stage two: denoiser",
    "matcher": "Matcher of images and text",
    "embedding": "Embedding of a token",
}

# title, patterns of metrics, label of the y axis, whether it is logarithmic, points that the bold line averages
CHARTS = (
    ("Loss", ("train/loss", "val/loss"), "", True, 9),
    ("Reconstruction", ("train/rec", "train/lpips", "val/lpips"), "", True, 9),
    ("PSNR", ("val/psnr",), "dB", False, 0),
    ("SSIM", ("val/ssim",), "", False, 0),
    ("Retrieval accuracy", ("val/image_to_text", "val/text_to_image"), "share of the validation samples", False, 0),
    ("FID", ("val/*fid*",), "", True, 0),
    ("KID", ("val/kid_*",), "", False, 0),
    ("CMMD", ("val/cmmd_*",), "", True, 0),
    ("Precision and recall", ("val/precision_*", "val/recall_*"), "share of the images", False, 0),
    ("Density and coverage", ("val/density_*", "val/coverage_*"), "", False, 0),
    ("Vendi score", ("val/vendi_*",), "images", False, 0),
    ("CLIPScore", ("val/clipscore_*",), "", False, 0),
    ("Retrieval accuracy of generated images", ("val/retrieval_*",), "share of the images", False, 0),
    ("Validation loss by time t, in tenths", ("val/loss_bin_0[02469]",), "", True, 0),
    ("KL", ("train/kl",), "nats per pixel value", True, 9),
    ("Adversarial losses", ("train/g", "train/d"), "", False, 9),
    ("Discriminator accuracy", ("train/d_accuracy",), "share of patches", False, 9),
    ("Adversarial weight", ("train/g_weight",), "", False, 9),
    ("GAN guard level", ("val/g_level",), "share of the configured weight", False, 0),
    ("Learning rate", ("train/lr*",), "", False, 0),
    ("Gradient norm", ("train/*grad_norm*",), "before clipping", True, 9),
    ("Skipped steps", ("train/*skipped*",), "total", False, 0),
    ("Quarantined samples", ("data/quarantined",), "total", False, 0),
    ("Speed", ("time/images_per_second",), "images per second", False, 0),
    ("Waiting for data", ("time/data_wait_share",), "share of the time", False, 0),
    ("Model FLOPs utilisation", ("time/mfu",), "share of the peak", False, 0),
)


@dataclass
class RunRecord:
    """The files of a run's folder."""

    folder: Path
    config: RunConfig
    starts: list[Start]
    curves: Curves  # metrics over steps

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Raises :class:`UsageError` for a folder that is no run's, :class:`LdmError` for a file that cannot be read."""
        run = RunFolder(folder)
        return cls(folder, run.read_config(), run.read_starts(), read_metrics(run.metrics))

    @property
    def stage(self) -> str:
        if "token" in self.config["model"]:
            return "embedding"
        return next((stage for stage in ("denoiser", "matcher") if stage in self.config["model"]), "autoencoder")

    @property
    def artifact(self) -> Path:
        """The folder of the exported model."""
        name = "adapter" if self.config["model"].get("adapter") else {"denoiser": "pipeline"}.get(self.stage, self.stage)
        return Path(self.config.get("export") or self.folder / name)

    @property
    def max_steps(self) -> int:
        return self.config["trainer"]["max_steps"]

    @cached_property
    def step(self) -> int:
        """The last step in the metrics and records."""
        logged = (int(steps[-1]) for name, (steps, _) in self.curves.items() if name != "data/quarantined")
        ended = (start["ended"]["step"] for start in self.starts if "ended" in start)
        return max((*logged, *ended, *(start["resumed_at_step"] or 0 for start in self.starts)), default=0)

    @cached_property
    def last_written(self) -> float:
        """When the run last wrote a file, in seconds since 1970."""
        run = RunFolder(self.folder)
        folders = run.logs, run.previews_folder, run.checkpoints_folder
        paths = (path for folder in folders if folder.is_dir() for path in (folder, *folder.iterdir()))
        return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)

    def latest(self, name: str) -> float | None:
        """The last value of a metric."""
        return self.curves[name][1][-1] if name in self.curves else None

    def state(self, now: float) -> str:
        """``training``, ``finished``, or ``stopped`` with why, at ``now`` in seconds since 1970."""
        ended = self.starts[-1].get("ended") if self.starts else None
        if 0 <= self.max_steps <= self.step and (ended is not None or os.path.exists(self.artifact)):
            return "finished"
        if ended is not None:
            return f"stopped: {ended['why']}" if "why" in ended else "stopped" if self.max_steps >= 0 else "finished"
        every = self.config["trainer"].get("log_every_n_steps") or 1
        patience = max(SILENT_SECONDS, SILENT_ROWS * every * (self.latest("time/step_seconds") or 0))
        silent = now - self.last_written
        return "training" if silent < patience else f"stopped: nothing written for {duration(silent)}"

    def seconds_left(self) -> float | None:
        """Estimated from the last rows of metrics, pauses included."""
        steps, elapsed = self.curves.get("time/elapsed_seconds", ([], []))
        steps, elapsed = steps[-RECENT_ROWS:], elapsed[-RECENT_ROWS:]
        first = (steps[0], elapsed[0]) if len(steps) > 1 else (0, 0)
        if not steps or steps[-1] <= first[0]:
            return None
        return (self.max_steps - self.step) * (elapsed[-1] - first[1]) / (steps[-1] - first[0])

    def checkpoints(self) -> list[tuple[int | None, Path]]:
        """(step, file or folder), the oldest first, without links and unfinished ones."""
        found: list[tuple[int | None, Path]] = []
        for path in RunFolder(self.folder).checkpoints_folder.glob("*.ckpt"):
            step = re.search(r"step[=-]?(\d+)", path.name)
            if not path.is_symlink() and not path.name.startswith("."):
                found.append((int(step[1]) if step else None, path))
        return sorted(found, key=lambda pair: (pair[0] is None, pair[0]))


def write_run_report(folder: Path, out: Path, refresh_seconds: int | None = None) -> str:
    """Write the page about the run in ``folder`` to ``out``, atomically; returns :meth:`RunRecord.state`.

    ``refresh_seconds``: how often an open page reloads itself while the run trains. Raises :class:`UsageError` where
    ``folder`` is not that of a run.
    """
    run, now = RunRecord.read(folder), time.time()
    state = run.state(now)
    page = Report(
        f"{run.folder.resolve().name}: {state}",
        f"{TITLES[run.stage]} · page written {_clock(now)} · run last wrote {_clock(run.last_written)}",
        refresh_seconds if state == "training" else None,
    )
    _progress(page, run, state)
    _images(page, run)
    _charts(page, run)
    _data(page, run)
    _checkpoints(page, run)
    _commands(page, run, state)
    _what(page, run)
    _log(page, run)
    page.save(out)
    return state


def _clock(seconds: float) -> str:
    seconds = min(max(seconds, 0), 2**37)  # a file system may hold times that Python cannot represent
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _progress(page: Report, run: RunRecord, state: str) -> None:
    elapsed, left, wait = run.latest("time/elapsed_seconds"), run.seconds_left(), run.latest("time/data_wait_share")
    shown: dict[str, str | float | None] = {
        f"of {run.max_steps:,} steps" if run.max_steps >= 0 else "steps": run.step,
        "elapsed": duration(elapsed) if elapsed is not None else None,
        "time left": duration(left) if left is not None and run.step < run.max_steps else None,
        "images per second": run.latest("time/images_per_second"),
        "waiting for data": f"{wait:.0%}" if wait is not None else None,
    }
    mfu = run.latest("time/mfu")
    named = {"train/loss": "loss", "val/loss": "validation loss", "val/psnr": "validation PSNR (dB)", "val/lpips": "LPIPS"}
    named |= {"train/lr": "learning rate", "val/g_level": "GAN guard level", "train/skipped": "skipped steps"}
    shown |= {label: run.latest(name) for name, label in named.items()}
    shown |= {"model FLOPs utilisation": f"{mfu:.1%}" if mfu is not None else None}
    page.metrics({"state": state.partition(":")[0]} | {name: value for name, value in shown.items() if value is not None})


def _images(page: Report, run: RunRecord) -> None:
    previews = RunFolder(run.folder).previews()
    if not previews:
        return
    step, path = previews[-1]
    grid, _ = read_grid(path)
    page.image(f"Preview after {step:,} steps", grid, "From fixed images or noise, with the averaged weights.")
    if len(previews) < 2:
        return
    chosen = [previews[number] for number in _spread(len(previews), STRIP_ROWS)]
    # One image of each row where a row has one image, else the last row. Grids of earlier versions are shown whole.
    grids = [(step, *read_grid(path)) for step, path in chosen]
    rows = []
    for step, _, labelled in grids:
        alone = all(len(images) == 1 for _, images in labelled)
        images = [images[0] for _, images in labelled] if alone else labelled[-1][1]
        rows.append((f"{step:,} steps", images[:STRIP_IMAGES]))
    steps = [f"{step:,} steps" for step, _ in chosen]
    if not all(images for _, images in rows):
        strip = captioned_grid([grid for _, grid, _ in grids], steps, cell=260)
    elif all(len(images) == 1 for _, images in rows):
        strip = captioned_grid([images[0] for _, images in rows], steps, columns=len(rows), cell=STRIP_CELL)
    else:
        strip = paired_grid(rows, STRIP_CELL)
    page.image("Previews, first to last", strip)


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` indices, evenly spread, with both ends."""
    if count <= most:
        return list(range(count))
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]


def _charts(page: Report, run: RunRecord) -> None:
    charted = set()
    for title, patterns, label, log_y, smooth in CHARTS:
        names = [name for pattern in patterns for name in sorted(run.curves) if fnmatch(name, pattern)]
        charted |= set(names)
        if names and not (label == "total" and not any(run.latest(name) for name in names)):
            series = {name: run.curves[name] for name in names}
            page.curve(title, series, "step", label, log_y, smooth, half=True)
    if not run.curves:
        every = run.config["trainer"].get("log_every_n_steps") or 1
        page.text("Metrics", f"None yet: the first row comes after {every} steps.")
    others = sorted(name for name in run.curves.keys() - charted if not name.startswith("time/"))
    if others:
        lines = [f"{name}: {run.curves[name][1][0]:.5g} → {run.curves[name][1][-1]:.5g}" for name in others]
        page.folded(f"{len(others)} more metrics, first → last", "\n".join(lines))


def _data(page: Report, run: RunRecord) -> None:
    """Quarantined samples of all processes."""
    known: dict[BadSample, None] = {}
    unreadable = 0
    for path in RunFolder(run.folder).quarantines():
        samples, half = read_quarantine(path)
        known |= dict.fromkeys(samples)
        unreadable += half
    rows = [[*sample] for sample in known]
    if unreadable:  # as a process that was killed leaves its last one
        rows.insert(0, ["", "", f"{unreadable} half-written {'line' if unreadable == 1 else 'lines'} left out"])
    if rows:
        few = f", {SHOWN_QUARANTINED} of them" if len(known) > SHOWN_QUARANTINED else ""
        page.table(f"{len(known):,} samples in quarantine{few}", ["shard", "key", "reason"], rows[:SHOWN_QUARANTINED])


def _checkpoints(page: Report, run: RunRecord) -> None:
    checkpoints = run.checkpoints()
    if not checkpoints:
        page.text("Checkpoints", "None yet.")
        return
    folder = RunFolder(run.folder)
    marked = {"last": folder.last_checkpoint.resolve(), "best": folder.best_checkpoint.resolve()}
    rows = []
    for step, path in checkpoints:
        size = sum(_size(file) for file in ([path] if path.is_file() else path.rglob("*")))
        marks = [name for name, marked_path in marked.items() if marked_path == path.resolve()]
        rows.append([path.name, step, f"{size / 2**20:,.1f} MiB", ", ".join(marks)])
    page.table("Checkpoints", ["name", "step", "size", ""], rows)


def _size(path: Path) -> int:
    """Bytes; 0 for a file that the running training has removed meanwhile."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _commands(page: Report, run: RunRecord, state: str) -> None:
    folder, config = shlex.quote(str(run.folder)), shlex.quote(str(RunFolder(run.folder).config))
    commands, artifact = [], shlex.quote(str(run.artifact))
    base = shlex.quote(run.config["model"].get("init_from") or "BASE")
    if state == "finished" and run.artifact.name == "adapter":
        commands.append(("generate images", f'ldm sample {base} "a prompt" --lora {artifact} --out images'))
    elif state == "finished" and run.stage == "denoiser":
        commands.append(("generate images", f'ldm sample {artifact} "a prompt" --out images'))
    elif state == "finished" and run.stage == "embedding":
        commands.append(("a pipeline that knows the token", f"ldm embedding merge {base} {artifact} pipeline"))
    elif state == "finished" and run.stage == "autoencoder":
        shards = run.config.get("data", {}).get("train")
        shards = shlex.quote(shards) if isinstance(shards, str) else "SHARDS"
        export = f"ldm latents export --autoencoder {artifact} --shards {shards} --out latents"
        commands.append(("continue with stage two", export))
    elif state not in ("training", "finished"):
        commands.append(("resume", f"ldm {run.stage} fit --config {config} --out {folder} --resume latest"))
    commands.append(("compare with other runs", f"tensorboard --logdir {shlex.quote(str(run.folder.parent))}"))
    page.commands("Next steps", commands)


def _what(page: Report, run: RunRecord) -> None:
    """Networks, versions, starts and the config."""
    model, last = run.config["model"], run.starts[-1] if run.starts else None
    counts = last.get("parameters", {}) if last else {}
    names = dict.fromkeys([*counts, *(name for name in ("denoiser", "matcher", "autoencoder") if name in model)])
    rows = [[name, _class_of(model.get(name)), counts.get(name)] for name in names]
    page.table("Networks", ["part", "class or directory", "parameters"], rows)
    if adapter := model.get("adapter"):
        words = adapter.get("trigger_words")
        if words is None:  # as training/denoiser.py has them
            words = filter(None, [run.config.get("data", {}).get("default_caption")])
        given = {"base": model.get("init_from")} | adapter | {"trigger_words": ", ".join(words) or "none"}
        rows = [[name.replace("_", " "), value] for name, value in given.items() if value is not None]
        page.table("Adapter", ["", ""], rows)
    if last:
        rows = []
        for start in run.starts:
            ended, resumed, git = start.get("ended"), start["resumed_at_step"], start["git"]
            until = f"step {ended['step']:,}, {ended.get('why', 'finished')}" if ended else "–"
            commit = git["commit"][:12] + (" + changes" if git["dirty"] else "") if git else "no git checkout"
            began = start["started"][:19].replace("T", " ")
            rows.append([began, f"{resumed or 0:,}", until, f"{start['processes']}", start["precision"], commit])
        page.table("Starts", ["started", "from step", "until", "processes", "precision", "commit"], rows)
        page.table("Machine and versions", ["", ""], [[name, value] for name, value in last["versions"].items()])
        page.folded("Command", last["command"])
    page.folded("Config", read_bytes(RunFolder(run.folder).config, MAX_YAML_BYTES).decode("utf-8", "replace"))


def _class_of(section: Any) -> str:
    """``DiT`` of ``class_path: ldm.models.dit.DiT``; of a directory, its path."""
    if isinstance(section, dict):
        return str(section.get("class_path", "")).rpartition(".")[2]
    return section if isinstance(section, str) else ""


def _log(page: Report, run: RunRecord) -> None:
    lines = _tail(RunFolder(run.folder).log())
    if lines:
        page.folded("Last lines of the log", "\n".join(lines), opened=True)
    for path in RunFolder(run.folder).other_logs():
        page.folded(f"Warnings of {path.stem.removeprefix('run-')}", "\n".join(_tail(path)))


def _tail(path: Path) -> Sequence[str]:
    if not path.exists():
        return []
    with open_regular(path) as file:
        file.seek(max(path.stat().st_size - LOG_BYTES, 0))
        return file.read().decode("utf-8", "replace").splitlines()[-LOG_LINES:]
