"""The command line: its frozen list of flags, one line for what a user can mend, nothing heavy before it is needed."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import typer.main

from harness import cli, taskset
from harness.engine import ModelError
from harness.errors import HarnessError
from tests.harness.made_up import write_tasks

REPOSITORY = Path(__file__).resolve().parents[2]

# A new flag is a decision: it must not be able to change a score. Those belong into the config. --fast may change last
# bits, so what it made is never published.
FLAGS = {
    "run": {"config", "--dry-run", "--limit", "--out", "--replicas", "--address", "--gpus", "--device", "--fast"},
    "compare": {"run_folder", "other", "--across-weights"},
    "publish": {"run_folder", "--out"},
    "rescore": {"runs"},
    "tasks": set(),
    "convert": {"source", "destination", "--context"},
    "train": {"config", "--out", "--resume"},
    "bench attention": {"--only", "--rounds", "--out"},
    "bench engine": {"--contexts", "--seconds", "--model", "--out"},
    "bench kernels": {"--only", "--rounds", "--out"},
    "bench lm-eval": {"config", "--limit", "--batch", "--dtype", "--out"},
    "bench page": {"path"},
    "bench model": {"--contexts", "--rounds", "--out"},
}


def commands() -> dict[str, object]:
    root = typer.main.get_command(cli.app)
    found = {}
    for name, command in root.commands.items():
        inner = getattr(command, "commands", None)
        found.update({f"{name} {key}": value for key, value in inner.items()} if inner else {name: command})
    return found


def call(monkeypatch, *words: str) -> int:
    """Exit code of the command line, as the shell would get it."""
    monkeypatch.setattr(sys, "argv", ["dsa-eval", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def stand_in(monkeypatch, module: str, **functions) -> None:
    """A module of the harness that a command imports when it runs."""
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**functions))


def test_the_flags_are_the_allowed_ones():
    found = {
        name: {
            max(parameter.opts, key=len) if parameter.param_type_name == "option" else parameter.name
            for parameter in command.params
        }
        for name, command in commands().items()
    }
    assert found == FLAGS


def test_every_command_and_flag_says_what_it_does():
    for name, command in commands().items():
        assert command.help, name
        assert all(parameter.help for parameter in command.params), name


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from harness.cli import main\n"
        "sys.argv = ['dsa-eval', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'lm_eval', 'transformers', 'datasets', 'pydantic', 'plotly', 'numpy', 'yaml'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))\n"
        "import time; print('quick:', time.process_time() < 1)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert "Commands" in out and "heavy: []" in out and "quick: True" in out


def test_options_of_run_reach_it(monkeypatch):
    seen = []
    stand_in(monkeypatch, "harness.run", run=lambda config, **options: seen.append((config, options)))
    words = ["run", "a.yaml", "--limit", "2", "--out", "o", "--replicas", "0", "--address", "auto", "--gpus", "0.5"]
    assert call(monkeypatch, *words, "--device", "cuda", "--dry-run") == 0
    expected = {"out": Path("o"), "limit": 2, "replicas": 0, "address": "auto", "gpus": 0.5, "device": "cuda"}
    assert seen == [(Path("a.yaml"), expected | {"dry_run": True, "fast": False})]
    assert call(monkeypatch, "run", "a.yaml", "--fast") == 0
    assert seen[1][1]["fast"] is True


@pytest.mark.parametrize("error", [HarnessError, ModelError])
def test_a_users_error_is_one_line_and_exit_code_2(monkeypatch, capsys, error):
    def run(config, **options):
        raise error("variants.a.topk: expected a positive number\nof keys, got -1")

    stand_in(monkeypatch, "harness.run", run=run)
    assert call(monkeypatch, "run", "a.yaml") == 2
    captured = capsys.readouterr()
    assert captured.err == "dsa-eval: variants.a.topk: expected a positive number of keys, got -1\n"
    assert captured.out == ""


def test_a_bug_keeps_its_traceback(monkeypatch):
    def run(config, **options):
        raise KeyError("bug")

    stand_in(monkeypatch, "harness.run", run=run)
    monkeypatch.setattr(sys, "argv", ["dsa-eval", "run", "a.yaml"])
    with pytest.raises(KeyError):
        cli.main()


def test_ctrl_c_says_in_one_line_how_to_go_on(monkeypatch, capsys):
    def publish(run_folder, out):
        raise KeyboardInterrupt

    stand_in(monkeypatch, "harness.publish", publish=publish)
    assert call(monkeypatch, "publish", "runs/a b") == 130
    assert capsys.readouterr().err == "dsa-eval: stopped; go on with: dsa-eval publish 'runs/a b'\n"


@pytest.mark.parametrize(
    "words", [["rum"], ["run"], ["run", "a.yaml", "--limit", "0"], ["run", "a.yaml", "--replicas", "-1"]]
)
def test_a_wrong_command_line_exits_with_2(monkeypatch, words):
    assert call(monkeypatch, *words) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("name: a\nmodle: {path: b}\n", "modle: unknown key; the nearest is 'model'"),
        (
            "{name: a, model: {scripted: gold}, variants: {x: {}}, tasks: [{task: wrds}]}",
            "tasks.0.task: unknown task 'wrds'; the nearest is 'words'",
        ),
    ],
)
def test_a_wrong_config_stops_before_anything_is_written(monkeypatch, tmp_path, capsys, text, message):
    pytest.importorskip("harness.run")
    monkeypatch.setattr(taskset, "TASKS", write_tasks(tmp_path))
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("a.yaml").write_text(text)
    assert call(monkeypatch, "run", "a.yaml", "--replicas", "0") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not Path("runs").exists()


def test_compare_prints_the_verdicts_of_one_run(monkeypatch, capsys):
    rows = {"rows": [{"sentence": "words: EQUIVALENT."}, {"sentence": "colours: DIFFERENT."}]}
    stand_in(monkeypatch, "harness.rescore", tabulate=lambda folder: ({}, rows))
    assert call(monkeypatch, "compare", "runs/a") == 0
    assert capsys.readouterr().out == "words: EQUIVALENT.\ncolours: DIFFERENT.\n"


def test_compare_needs_something_to_compare_with(monkeypatch, capsys):
    stand_in(monkeypatch, "harness.rescore", tabulate=lambda folder: ({}, None))
    assert call(monkeypatch, "compare", "runs/a") == 2
    assert "expected a baseline and two variants in the config" in capsys.readouterr().err


def test_compare_of_two_runs_hands_on_the_permission(monkeypatch, capsys):
    seen = []

    def compare_runs(first, second, across_weights):
        seen.append((first, second, across_weights))
        return {"rows": []}

    stand_in(monkeypatch, "harness.compare_runs", compare_runs=compare_runs)
    assert call(monkeypatch, "compare", "a", "b", "--across-weights") == 0
    assert seen == [(Path("a"), Path("b"), True)]


def test_tasks_lists_names_options_and_protocols(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(taskset, "TASKS", write_tasks(tmp_path))
    assert call(monkeypatch, "tasks") == 0
    out = capsys.readouterr().out
    assert "words" in out and "options: lengths: [200]" in out and "protocol: tasks/made_up/README.md" in out
    assert "lm_eval/<name>" in out
