"""The command line. Nothing heavy is imported before a command runs; every user's error is one line and exit code 2."""

import functools
import itertools
import shlex
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec

import typer
import typer.main
from typer.core import TyperCommand

P = ParamSpec("P")
HELP_WIDTH = 100  # columns of the list of tasks
USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, what a shell gives for Ctrl-C


class PlainUsage(TyperCommand):
    """`run CONFIG` in the usage line, where Typer writes `run {CONFIG}`."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]


app = typer.Typer(
    help="Does sparse attention cost accuracy, where does the indexer miss, and what does it save?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench_app = typer.Typer(help="Measure speed and memory.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
command = functools.partial(app.command, cls=PlainUsage)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, e.g. runs/quickstart-<digest>.")]


def one_line_errors(function: Callable[P, None]) -> Callable[P, None]:
    """Errors that the user can mend are printed without a traceback; anything else is a bug and keeps its own."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        from harness.engine import ModelError
        from harness.errors import HarnessError

        try:
            function(*args, **kwargs)
        except (HarnessError, ModelError) as error:
            print(f"dsa-eval: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            print(f"dsa-eval: stopped; go on with: {shlex.join(['dsa-eval', *sys.argv[1:]])}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None

    return wrapped


@command()
@one_line_errors
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, e.g. configs/quickstart.yaml.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, run nothing.")] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N samples of every task.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Run folder.  [default: runs/<name>-<digest>]")
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="Worker processes; 0 runs in this one, without Ray.  [default: as many as fit]"
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="A running Ray cluster, or `auto`.  [default: Ray on this machine]"),
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(min=0, metavar="N", help="GPUs of each worker, e.g. 1, or 0.2 of one and of its memory."),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where local models run; auto takes GPUs if there are any.")
    ] = "auto",
    fast: Annotated[
        bool,
        typer.Option("--fast", help="GPU: last bits may depend on what else is asked. Not for published accuracy."),
    ] = False,
) -> None:
    """Run every variant on every task. The same command again resumes."""
    from harness.run import run as run_config

    run_config(
        config,
        out=out,
        limit=limit,
        replicas=replicas,
        address=address,
        gpus=gpus,
        device=device,
        fast=fast,
        dry_run=dry_run,
    )


@command()
@one_line_errors
def compare(
    run_folder: RunFolder,
    other: Annotated[
        Path | None,
        typer.Argument(metavar="OTHER", help="A second run: its variants against those of the first, by name."),
    ] = None,
    across_weights: Annotated[
        bool, typer.Option("--across-weights", help="Allow runs of different weights; every line says so.")
    ] = False,
) -> None:
    """Print a verdict on every variant of one run, or of two runs."""
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


@command()
@one_line_errors
def publish(
    run_folder: RunFolder,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the folder <name>/ is written.")] = Path("results"),
) -> None:
    """Write a run's tables and its page into results/<name>/."""
    from harness.publish import publish as publish_run

    for path in publish_run(run_folder, out):
        print(path)


@command()
@one_line_errors
def rescore(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders; several are merged into a new one.")],
) -> None:
    """Score a run again from its journal; several runs are merged."""
    from harness.rescore import rescore as rescore_runs

    print(rescore_runs(runs))


@command()
@one_line_errors
def tasks() -> None:
    """List the tasks that a config can name."""
    from harness.taskset import list_tasks

    for explained, group in itertools.groupby(list_tasks(), key=_explained):
        print(_wrapped(", ".join(task["task"] for task in group)), *explained, sep="\n    ")
    print("lm_eval/<name>", "any generate_until or loglikelihood task of the installed lm-eval", sep="\n    ")
    print("    options: num_fewshot: null")


def _explained(task: Mapping[str, Any]) -> list[str]:
    """What stands below a task's name: title, options with their defaults as YAML, protocol."""
    import yaml

    options = yaml.safe_dump(task["options"], default_flow_style=True, sort_keys=False, width=10**6).strip("{}\n")
    lines = [task["about"], f"options: {options}" if options else "", f"protocol: {task['readme'] or ''}"]
    return [_wrapped(line, "        ") for line in lines if line and line != "protocol: "]


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, width=HELP_WIDTH, subsequent_indent=indent, break_long_words=False)


@command()
@one_line_errors
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Checkpoint: bundled name, folder or hub id.")],
    destination: Annotated[
        str, typer.Argument(metavar="DESTINATION", help="Folder to write; must not exist or be empty.")
    ],
    context: Annotated[
        int | None,
        typer.Option(min=1, metavar="TOKENS", help="Declare a longer context: rotations are stretched by YaRN."),
    ] = None,
) -> None:
    """Write a GQA, GGUF or FP8 checkpoint as a latent-attention one."""
    from harness.engine import convert as convert_checkpoint

    print(convert_checkpoint(source, destination, context))


@command()
@one_line_errors
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, e.g. configs/train/dsa-tiny.yaml.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder to write.  [default: runs/train-<name>]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's latest checkpoint.")] = False,
) -> None:
    """Train a model, or the indexer of one."""
    from harness.train import train as train_config

    train_config(config, out=out, resume=resume)


@bench_app.command("model", cls=PlainUsage)
@one_line_errors
def bench_model(
    contexts: Annotated[str, typer.Option(metavar="N,N,...", help="Context lengths in tokens.")] = "1024,4096,16384",
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Measurements of each side and length.")] = 3,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file to write as well.")] = None,
) -> None:
    """Speed and memory against transformers on one random model."""
    from harness.bench import bench_model as bench

    bench(contexts, rounds, out)


@bench_app.command("kernels", cls=PlainUsage)
@one_line_errors
def bench_kernels(
    only: Annotated[str, typer.Option(metavar="TEXT,...", help="Only cases whose name contains one of these.")] = "",
    rounds: Annotated[int, typer.Option(min=2, metavar="N", help="Timed calls of each case.")] = 20,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file to write, with page and plot.")] = None,
) -> None:
    """Times of the GPU kernels beside their peers', after their tests."""
    from harness.bench import bench_kernels as bench

    if not bench(only, rounds, out):
        raise typer.Exit(1)


@bench_app.command("attention", cls=PlainUsage)
@one_line_errors
def bench_attention(
    only: Annotated[str, typer.Option(metavar="TEXT,...", help="Only rows whose name contains one of these.")] = "",
    rounds: Annotated[int, typer.Option(min=2, metavar="N", help="Timed calls of each row.")] = 20,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file to write, with page and plot.")] = None,
) -> None:
    """Times of the whole attention step on a GPU, sparse beside dense, after the tests of its kernels."""
    from harness.bench import bench_attention as bench

    if not bench(only, rounds, out):
        raise typer.Exit(1)


@bench_app.command("page", cls=PlainUsage)
@one_line_errors
def bench_page(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="JSON of bench kernels, attention, engine or lm-eval.")],
) -> None:
    """Write a measured benchmark's table and plot beside its JSON."""
    from harness.bench import bench_page as page

    page(path)


@bench_app.command("engine", cls=PlainUsage)
@one_line_errors
def bench_engine(
    contexts: Annotated[
        str, typer.Option(metavar="N,N,...", help="Context lengths in tokens.")
    ] = "8192,32768,65536,131072",
    seconds: Annotated[float, typer.Option(min=1, metavar="N", help="Start no measurement after this long.")] = 240,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Model or folder, also on a CPU; else V3.2's widths on a GPU.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON file to write as well, a table in Markdown beside it.")
    ] = None,
) -> None:
    """Prompt and answer rates and memory of the engine, sparse and dense, default and fast, after its tests."""
    from harness.bench import bench_engine as bench

    bench(contexts, seconds, model, out)


@bench_app.command("lm-eval", cls=PlainUsage)
@one_line_errors
def bench_lm_eval(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, e.g. configs/smollm2.yaml.")],
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N samples of every task.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Batch of lm-eval's model.")] = 32,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Of both sides, in place of the config's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file to write as well.")] = None,
) -> None:
    """A config's questions, dense, against lm-eval's hf model: samples/s, and whether the answers are the same."""
    from harness.against import bench_lm_eval as bench

    bench(config, limit, batch, out, dtype)


def main() -> None:
    """Run the command of sys.argv; a wrong command line is one line as well."""
    command = typer.main.get_command(app)
    try:
        code = command(prog_name="dsa-eval", standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message") or not hasattr(error, "ctx"):  # all that click's kinds have in common
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
            print(error.format_message())
            raise SystemExit(USER_ERROR) from None
        path = error.ctx.command_path if error.ctx is not None else "dsa-eval"
        print(f"dsa-eval: {' '.join(error.format_message().split())} (see {path} --help)", file=sys.stderr)
        raise SystemExit(USER_ERROR) from None
    raise SystemExit(code or 0)
