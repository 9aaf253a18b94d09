"""What the documentation says is so: its commands parse, its Python runs, and what it names or links to exists.

Commands are those of the READMEs, of the headers of the recipes and launchers, and of the examples that ``--help`` gives.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pydoc
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from braceexpand import braceexpand
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.distributed.run import get_args_parser as torchrun_parser
from transformers import AutoModel, AutoTokenizer

from ldm.cli import build_parser, training
from ldm.cli.parser import Parser
from ldm.models.adapter_file import write_adapter
from ldm.models.dit import DiT
from ldm.pipeline import LatentDiffusionPipeline
from ldm.runs.dry_run.command import DryRunCLI
from ldm.training.adapters import Adapter, AdapterConfig
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.base import TrainingModule
from ldm.training.denoiser import DenoiserTraining
from ldm.training.matcher import MatcherTraining
from ldm.training.textual_inversion import TextualInversion

ROOT = Path(__file__).parents[1]
READMES = [
    ROOT / "README.md",
    *(path for top in ("configs", "ldm", "tools") for path in sorted((ROOT / top).rglob("README.md"))),
]
STAGES: dict[str, type[TrainingModule]] = {
    "autoencoder": AutoencoderTraining,
    "denoiser": DenoiserTraining,
    "embedding": TextualInversion,
    "matcher": MatcherTraining,
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
every_readme = pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(readme: Path, language: str) -> list[str]:
    return [text for name, text in FENCE.findall(readme.read_text()) if name == language]


def quoted(readme: Path) -> list[str]:
    """What stands in backticks outside of code blocks, on one line each."""
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", FENCE.sub("", readme.read_text()))]


# -- commands ------------------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """Raised in the place of what a command would do; holds its parser, and the arguments that this does not know."""

    def __init__(self, parser: argparse.ArgumentParser, rest: list[str]):
        self.parser, self.rest = parser, rest


class ParserOnly(DryRunCLI):
    """``fit`` up to its parsed options."""

    def _set_seed(self) -> None: ...

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


def config(stage: str) -> list[str]:
    return ["fit", "--config", str(ROOT / "configs" / "shapes" / f"{stage}.yaml"), "--out", "run"]


@pytest.fixture(scope="module")
def fits() -> dict[str, ParserOnly]:
    """``fit`` of all trainings, with a recipe's options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return {stage: ParserOnly(module, config(stage)) for stage, module in STAGES.items()}


@pytest.fixture
def commands(fits: dict[str, ParserOnly], monkeypatch: pytest.MonkeyPatch) -> Commands:
    monkeypatch.chdir(ROOT)
    return Commands(fits, monkeypatch)


class Commands:
    """Parses command lines as those who read the documentation would type them."""

    def __init__(self, fits: dict[str, ParserOnly], monkeypatch: pytest.MonkeyPatch):
        self.fits, self.monkeypatch = fits, monkeypatch

    def check(self, line: str) -> None:
        """A whole command; anything that cannot be parsed fails the test."""
        words = list(itertools.dropwhile(lambda word: re.match("[A-Z]+=", word), shlex.split(line, comments=True)))
        match words:
            case ["ldm", *arguments]:
                self.ldm(arguments)
            case ["torchrun", *arguments]:
                options = torchrun_parser().parse_args(arguments)
                assert options.module and options.training_script == "ldm"
                self.ldm(options.training_script_args)
            case ["bash", "tools/quickstart.sh", *arguments]:
                self.ldm(["quickstart", *arguments])
            case ["bash", script]:
                assert (ROOT / script).is_file()
            case ["sbatch", script, *arguments] | [script, *arguments] if script.startswith("configs/cluster/"):
                assert (ROOT / script).is_file() and (words[0] == "sbatch" or os.access(ROOT / script, os.X_OK))
                self.ldm(arguments)
            case ["python", script, *arguments]:
                parsed = self.script(script, arguments)
                assert parsed.rest == [] or script.endswith("scaling.py")  # whose further options are those of fit
            case _:
                assert words in (["source", ".venv/bin/activate"], []), f"nothing here checks {line}"

    def ldm(self, arguments: list[str]) -> None:
        if arguments[0] in STAGES and arguments[1:2] == ["fit"]:
            try:
                self.fits[arguments[0]].parser.parse_args(arguments[1:])
            except SystemExit as leave:  # --help, --print_config
                assert leave.code == 0
        elif arguments[0] in STAGES:
            assert self.made_of_a_run(arguments).rest == []
        else:
            build_parser().parse_args(arguments)

    def mentioned(self, text: str) -> None:
        """A command in running text, which may leave out what it does not speak of."""
        words = shlex.split(text)
        if words[1:] and words[1] in STAGES and (words[2:] == [] or words[2] == "fit"):
            self.fits[words[1]].parser.parse_args([*config(words[1]), *words[3:]])
            return

        def error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
            assert "are required" in message, f"{text}: {message}"
            raise Parsed(parser, [])

        self.monkeypatch.setattr(Parser, "error", error)
        try:
            self.ldm(words[1:])
        except Parsed as parsed:
            unknown = [word for word in words if word.startswith("-") and word not in parsed.parser._option_string_actions]
            assert not unknown, f"{text}: {parsed.parser.prog} has no {', '.join(unknown)}"

    def parsed(self, function, *arguments) -> Parsed:
        """What the first parser that ``function`` runs makes of the arguments that it is given."""
        original = argparse.ArgumentParser.parse_known_args

        def parse(parser: argparse.ArgumentParser, *given, **options) -> NoReturn:
            raise Parsed(parser, original(parser, *given, **options)[1])

        with self.monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
            with pytest.raises(Parsed) as caught:
                function(*arguments)
        return caught.value

    def made_of_a_run(self, arguments: list[str]) -> Parsed:
        """``ldm denoiser export`` and its like."""
        return self.parsed(training.run, arguments[0], arguments[1:])

    def script(self, script: str, arguments: list[str]) -> Parsed:
        self.monkeypatch.setattr(sys, "argv", [script, *arguments])
        self.monkeypatch.syspath_prepend((ROOT / script).parent)
        return self.parsed(lambda: runpy.run_path(str(ROOT / script), run_name="__main__"))


def lines(text: str) -> list[str]:
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


@every_readme
def test_commands_of_readmes_parse(commands: Commands, readme: Path) -> None:
    for block in blocks(readme, "bash"):
        for line in lines(block):
            commands.check(line)
    for text in quoted(readme):
        if text.startswith("ldm "):
            commands.mentioned(text)


HEADERS = [path for path in sorted((ROOT / "configs").rglob("*")) if path.is_file() and path.name != "README.md"]


@pytest.mark.parametrize("file", HEADERS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_commands_in_headers_parse(commands: Commands, file: Path) -> None:
    comments = "\n".join(line[2:] for line in file.read_text().splitlines() if line.startswith("# "))
    for line in lines(comments):
        if re.match(r"  ([A-Z]+=\S+ )*(ldm|configs/|sbatch|python|bash|torchrun)", line):
            for command in line.split("&&"):
                commands.check(command)


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """It and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers(below)


def argparse_parsers(commands: Commands) -> list[argparse.ArgumentParser]:
    after_fit = [(stage, "export") for stage in STAGES] + [("denoiser", "ema")]
    found = [commands.made_of_a_run([*words, "RUN", "OUT", *["--sigma-rel", "0.1"] * (words[1] == "ema")]).parser
             for words in after_fit]  # fmt: skip
    return [*parsers(build_parser()), *found]


def test_examples_of_the_help_parse(commands: Commands) -> None:
    examples = [line for parser in argparse_parsers(commands) for line in lines(parser.epilog or "") if line.startswith("  ")]
    assert len(examples) > 20
    for line in examples:
        commands.check(re.split(r"(?<=\S) {3,}", line)[0])  # what stands beside it says what it does


# -- what is named -------------------------------------------------------------------------------------------------------


def options_of(commands: Commands) -> set[str]:
    """Of all commands and benchmarks."""
    benches = [path for path in sorted((ROOT / "tools" / "bench").glob("*.py")) if '"__main__"' in path.read_text()]
    found = [*argparse_parsers(commands), *(commands.script(str(path.relative_to(ROOT)), []).parser for path in benches)]
    found += [parser for fit in commands.fits.values() for parser in parsers(fit.parser)]
    return {name for parser in found for name in parser._option_string_actions}


@pytest.fixture(scope="module")
def keys(fits: dict[str, ParserOnly]) -> set[str]:
    """Of every config: those of the parsers, and those of the recipes with all defaults."""
    found = set()
    for stage, fit in fits.items():
        for recipe in (config(stage)[2], *sorted((ROOT / "configs" / stage).glob("*.yaml"))):
            whole = [*config(stage), "--config", str(recipe)]  # some recipes are given after another one
            found |= {*fit.parser.parse_args(whole).fit.keys(branches=True)}
    return found


@every_readme
def test_options_and_settings_that_readmes_name_exist(commands: Commands, keys: set[str], readme: Path) -> None:
    options = options_of(commands) | {f"--{key}" for key in keys}
    for text in quoted(readme):
        for option in re.findall(r"(?:^|(?<= ))--[\w.-]+", text):
            assert option.partition(".init_args")[0] in options, f"no option {option}"
        if setting := re.match(r"(data|model|trainer|checkpoints)\.(?!py)[\w.]+", text):
            assert setting[0].partition(".init_args")[0] in keys, f"no setting {setting[0]}"


@every_readme
def test_names_and_files_that_readmes_name_exist(readme: Path) -> None:
    of_blocks = set(re.findall(r"`(\w+\.py)`:\n\n```python", readme.read_text()))
    for text in quoted(readme):
        if re.fullmatch(r"ldm(\.\w+)+", text):
            assert pydoc.locate(text), f"no {text}"
        elif (
            re.fullmatch(r"(configs|ldm|tests|tools|\.ci)/[\w./*{},-]+|[\w/]+\.py|\w+/\w+\.yaml", text)
            and text not in of_blocks
        ):
            for pattern in braceexpand(text):
                assert any([*ROOT.glob(pattern), *readme.parent.glob(pattern)]), f"no {pattern}"


def test_classes_of_where_to_add_stand_in_the_file_beside_them() -> None:
    rows = re.findall(r"^\| .*? \| `(\w+)`.* \| `(ldm/[\w/]+\.py)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    rows = [(name, file) for name, file in rows if name != "Metric"]  # of torchmetrics
    assert len(rows) >= 8
    for name, file in rows:
        assert re.search(rf"^(class {name}\b|{name}\b.*=)", (ROOT / file).read_text(), re.MULTILINE), f"no {name} in {file}"


def anchors(readme: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", readme.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_readme
def test_links_and_images_of_readmes_exist(readme: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", readme.read_text())):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            found = (readme.parent / path).resolve() if path else readme
            assert found.exists() and found.is_relative_to(ROOT), target
            assert not anchor or anchor in anchors(found), target


def test_files_that_notice_names_exist() -> None:
    named = re.findall(r"tools/[\w/.]+\w", (ROOT / "NOTICE").read_text())
    assert len(named) >= 3 and all((ROOT / name).is_file() for name in named)


# -- examples ------------------------------------------------------------------------------------------------------------


@every_readme
def test_python_of_readmes_runs(
    readme: Path, tiny_autoencoder, randomised, tiny_text_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they open ``quickstart/pipeline``, that is a tiny one, untrained, and so are adapters of it."""
    monkeypatch.chdir(tmp_path)
    found = blocks(readme, "python")
    if any("quickstart/pipeline" in block for block in found):
        dit = DiT(sample_size=8, width=32, num_layers=2, num_attention_heads=2, caption_channels=8)
        LatentDiffusionPipeline(
            vae=tiny_autoencoder,
            text_encoder=AutoModel.from_pretrained(tiny_text_encoder),
            tokenizer=AutoTokenizer.from_pretrained(tiny_text_encoder),
            transformer=randomised(dit).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        ).save_pretrained("quickstart/pipeline")
        if folders := re.findall(r'load_lora_weights\("([^"]+)"', "".join(found)):
            adapter = Adapter(AdapterConfig(rank=2), dit, "tiny")
            for folder in folders:
                write_adapter(Path(folder), *adapter.exported(), adapter.record({}))
    for block in found:
        exec(compile(block, str(readme), "exec"), {"__name__": "__main__"})


@every_readme
def test_yaml_of_readmes_is_a_config(
    readme: Path, fits: dict[str, ParserOnly], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(tmp_path)
    for name, block in re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)^```", readme.read_text(), re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(block)
    for block in blocks(readme, "yaml"):
        (tmp_path / "block.yaml").write_text(block)
        stage = "denoiser" if re.search("auxiliary_losses|freeze|adapter|denoiser:|evaluation:", block) else "autoencoder"
        fits[stage].parser.parse_args([*config(stage), "--config", str(tmp_path / "block.yaml")])


# -- form ----------------------------------------------------------------------------------------------------------------


def test_the_first_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@every_readme
def test_prose_has_at_most_120_columns(readme: Path) -> None:
    prose = FENCE.sub("", readme.read_text()).splitlines()
    assert [line for line in prose if len(line) > 120 and not line.startswith(("|", "!["))] == []


def test_spelling() -> None:
    said = subprocess.run([sys.executable, "-m", "codespell_lib", *READMES], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout + said.stderr == ""
