"""The house's import arrows: who may know whom, and what stays unloaded until it is needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# everything a package may import beside the standard library and itself
MAY_IMPORT = {
    "kernels": {"torch", "triton", "numpy"},
    "model": {"kernels", "torch", "numpy", "safetensors", "transformers", "tokenizers", "gguf", "huggingface_hub"},
    # tokenizers counts for a needle task run by lm-eval alone; huggingface_hub is where datasets keeps single files
    "tasks": {
        "lm_eval",
        "datasets",
        "evaluate",
        "math_verify",
        "numpy",
        "wonderwords",
        "tokenizers",
        "huggingface_hub",
    },
}
# the harness may import any dependency but these
HARNESS_NEVER = {"kernels", "triton", "transformers", "tokenizers", "safetensors", "math_verify", "wonderwords"}
HARNESS_ONLY_IN = {
    "model": "engine.py",
    "torch": "engine.py",
    "ray": "replicas.py",
    "lm_eval": "taskset.py",
    "tasks": "taskset.py",  # but for tasks.errors: tasks are reached through lm-eval's TaskManager
}
# the training corpus turns the tasks' generators into token rows in the model's own markup, without lm-eval
CORPUS = ("corpus", {"model", "tasks"})
HEAVY = ("torch", "ray", "lm_eval", "transformers", "datasets", "plotly")


def imported_modules(source: str) -> Iterator[str]:
    """Absolute names of all imported modules, those inside functions and by constant name included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
            if name in ("import_module", "__import__"):
                yield str(node.args[0].value)


def forbidden(path: Path, source: str) -> list[str]:
    """Modules that a file (path relative to the repository) must not import."""
    package = path.parts[0]
    found = []
    for module in imported_modules(source):
        top = module.split(".")[0]
        if top in sys.stdlib_module_names or top in (package, ""):
            continue
        if package in MAY_IMPORT:
            allowed = top in MAY_IMPORT[package]
        elif module == "tasks.errors" or (path.parts[1] == CORPUS[0] and top in CORPUS[1]):
            allowed = True
        elif top in HARNESS_ONLY_IN:
            allowed = path.parts[1:] == (HARNESS_ONLY_IN[top],)
        else:
            allowed = top not in HARNESS_NEVER
        if not allowed:
            found.append(module)
    return found


@pytest.mark.parametrize("package", ["kernels", "model", "tasks", "harness"])
def test_package_imports_only_along_its_arrows(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    broken = {}
    for file in files:
        path = file.relative_to(ROOT)
        if modules := forbidden(path, file.read_text(encoding="utf-8")):
            broken[str(path)] = modules
    assert broken == {}


@pytest.mark.parametrize(
    "path, source, modules",
    [
        ("kernels/a.py", "import model.request", ["model.request"]),
        ("model/a.py", "from harness.engine import x", ["harness.engine"]),
        ("model/chat/a.py", "from model.errors import ModelError\nimport torch.nn", []),
        ("tasks/t/a.py", "def f():\n    import torch", ["torch"]),
        ("tasks/t/a.py", "import importlib\nimportlib.import_module('model.chat')", ["model.chat"]),
        ("harness/plan.py", "from model.request import Request", ["model.request"]),
        ("harness/engine.py", "from model.request import Request", []),
        ("harness/deep/engine.py", "import model", ["model"]),
        ("harness/plan.py", "if TYPE_CHECKING:\n    import ray", ["ray"]),
        ("harness/replicas.py", "import ray\nimport lm_eval", ["lm_eval"]),
        ("harness/cli.py", "from tasks.errors import TaskError\nimport tasks.niah", ["tasks.niah"]),
        ("harness/cli.py", "import typer, transformers", ["transformers"]),
        ("harness/corpus/rows.py", "import model.chat.dsv32, tasks.words, torch", ["torch"]),
    ],
)
def test_the_arrows_catch_what_they_should(path, source, modules):
    assert forbidden(Path(path), source) == modules


@pytest.mark.parametrize(
    "module",
    ["harness", "harness.cli", "harness.engine", "harness.corpus.corpus", "model.request", "model.chat.encoding"],
)
def test_import_loads_nothing_heavy(module):
    if not (ROOT / (module.replace(".", "/") + ".py")).is_file() and not (ROOT / module).is_dir():
        pytest.skip(f"{module} is not written yet")
    program = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
