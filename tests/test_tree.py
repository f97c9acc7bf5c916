"""What holds for every tracked file: size, explained folders, nothing of one machine."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 400

HOME = re.compile(r"(?<![\w.)}])/(?:home|root|Users|work)/\w")
INDEX = re.compile(r"pypi\.(?:org|python)|pythonhosted\.org|download\.pytorch\.org|--(?:extra-)?index-url")


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """All files that git tracks, relative to the repository."""
    command = ["git", "ls-files", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout")
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


def lines_matching(pattern: re.Pattern[str], files: list[Path]) -> list[str]:
    found = []
    for path in files:
        text = (ROOT / path).read_bytes().decode("utf-8", errors="ignore")
        found += [f"{path}:{n}: {line[:120]}" for n, line in enumerate(text.split("\n"), 1) if pattern.search(line)]
    return found


def test_every_top_folder_has_a_readme(tracked):
    folders = {path.parts[0] for path in tracked if len(path.parts) > 1 and not path.parts[0].startswith(".")}
    assert [folder for folder in sorted(folders) if not (ROOT / folder / "README.md").is_file()] == []


def test_python_files_stay_short(tracked):
    lengths = {str(path): len((ROOT / path).read_bytes().splitlines()) for path in tracked if path.suffix == ".py"}
    assert lengths
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_no_file_names_a_folder_of_one_machine(tracked):
    assert lines_matching(HOME, tracked) == []


def test_no_file_names_a_package_index(tracked):
    assert lines_matching(INDEX, tracked) == []


@pytest.mark.parametrize(
    "pattern, line, matches",
    [
        (HOME, "data: /{}/books", True),
        (HOME, 'open("/{}/x.txt")', True),
        (HOME, "https://example.com/{}/page", False),
        (HOME, "$HOME/{}/x", False),
        (HOME, "tests/{}/x", False),
    ],
)
def test_machine_paths_are_told_from_addresses(pattern, line, matches):
    for folder in ("home", "work"):
        assert bool(pattern.search(line.format(folder))) == matches
