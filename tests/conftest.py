"""Fixtures that all tests may use: seeds from the test's own name, the optional folder of shared data."""

import os
import random
import tempfile
import zlib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
# metrics loaded by path are copied into a module cache: one of our own, or a run beside this one could change it
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="dsa-eval-modules-")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-readme", action="store_true", help="run the README's commands in full, not on two samples")


@pytest.fixture(autouse=True)
def seeded_by_test_name(request: pytest.FixtureRequest) -> None:
    """Every test draws the same numbers whatever ran before it."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    try:
        import numpy
        import torch
    except ImportError:
        return
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real benchmark questions and books, beside the repository or where DSA_EVAL_SHARED says."""
    folder = Path(os.environ.get("DSA_EVAL_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"needs benchmark data in {folder.name}/data beside the repository")
    return folder
