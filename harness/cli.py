"""The command line. Nothing heavy is imported before a command runs; every user's error is one line and exit code 2."""

import functools
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

P = ParamSpec("P")
USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, what a shell gives for Ctrl-C

app = typer.Typer(
    help="Does sparse attention cost accuracy, where does the indexer miss, and what does it save?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench_app = typer.Typer(help="Measure speed and memory.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

RunFolder = Annotated[Path, typer.Argument(help="Folder that `run` printed.")]


def one_line_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Errors that the user can mend are printed without a traceback; anything else is a bug and keeps its own."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        from harness.engine import ModelError
        from harness.errors import HarnessError

        try:
            command(*args, **kwargs)
        except (HarnessError, ModelError) as error:
            print(f"dsa-eval: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            print(f"dsa-eval: stopped; go on with: {shlex.join(['dsa-eval', *sys.argv[1:]])}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None

    return wrapped


@app.command()
@one_line_errors
def run(
    config: Annotated[Path, typer.Argument(help="YAML file of the experiment.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, run nothing.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="First N samples of every task.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<name>-<digest> if not given.")] = None,
    replicas: Annotated[int | None, typer.Option(min=0, help="Workers; 0 runs in this process, without Ray.")] = None,
    address: Annotated[str | None, typer.Option(help="Address of a Ray cluster; started here if not given.")] = None,
    gpus: Annotated[float | None, typer.Option(min=0, help="GPUs of each worker.")] = None,
) -> None:
    """Run every variant on every task. Given again, only what is missing is run."""
    from harness.run import run as run_config

    run_config(config, out=out, limit=limit, replicas=replicas, address=address, gpus=gpus, dry_run=dry_run)


@app.command()
@one_line_errors
def compare(
    run_folder: RunFolder,
    other: Annotated[
        Path | None, typer.Argument(help="A second run, compared with the first variant by variant.")
    ] = None,
    across_weights: Annotated[
        bool, typer.Option("--across-weights", help="Allow runs of different weights; the table says so.")
    ] = False,
) -> None:
    """Compare variants with the baseline, sample by sample, with a verdict."""
    from harness.errors import HarnessError

    if other is None:
        from harness.rescore import tabulate

        found = tabulate(run_folder)[1]
        if found is None:
            raise HarnessError(f"{run_folder}: compare: expected a baseline and two variants in the config")
    else:
        from harness.compare_runs import compare_runs

        found = compare_runs(run_folder, other, across_weights)
    for row in found["rows"]:
        print(row["sentence"])


@app.command()
@one_line_errors
def publish(
    run_folder: RunFolder, out: Annotated[Path, typer.Option(help="Folder of all publications.")] = Path("results")
) -> None:
    """Write tables and one self-contained page."""
    from harness.publish import publish as publish_run

    for path in publish_run(run_folder, out):
        print(path)


@app.command()
@one_line_errors
def rescore(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are merged into a new one.")],
) -> None:
    """Make scores and tables again from the journal, without model or data."""
    from harness.rescore import rescore as rescore_runs

    print(rescore_runs(runs))


@app.command()
@one_line_errors
def tasks() -> None:
    """List what a suite can name."""
    from harness.taskset import list_tasks

    for task in list_tasks():
        print(f"{task['task']:<24}{task['about']}")
        if task["options"]:
            print(f"{'':<24}options: {', '.join(f'{key}: {value}' for key, value in task['options'].items())}")
        if task["readme"]:
            print(f"{'':<24}protocol: {task['readme']}")
    print(f"{'lm_eval/<name>':<24}any generate_until or loglikelihood task of the installed lm-eval")
    print(f"{'':<24}options: num_fewshot: null")


@app.command()
@one_line_errors
def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint: bundled name, folder or hub id.")],
    destination: Annotated[str, typer.Argument(help="Folder to write.")],
) -> None:
    """Write a checkpoint (GQA, GGUF, FP8) as a folder of this project's architecture."""
    from harness.engine import convert as convert_checkpoint

    print(convert_checkpoint(source, destination))


@app.command()
@one_line_errors
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the training.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; runs/train-<name> if not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's latest checkpoint.")] = False,
) -> None:
    """Train a model, or the indexer of one; under torchrun on several GPUs."""
    from harness.train import train as train_config

    train_config(config, out=out, resume=resume)


@bench_app.command("model")
@one_line_errors
def bench_model(
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens, with commas.")] = "1024,4096,16384",
    rounds: Annotated[int, typer.Option(help="Measurements of each side and length.", min=1)] = 3,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Prefill, decode and memory against transformers on the same random configuration."""
    from harness.bench import bench_model as bench

    bench(contexts, rounds, out)


def main() -> None:
    app()
