"""Haystack texts of the user: one .txt file or a folder of them."""

from pathlib import Path

from tasks.errors import TaskError
from tasks.niah import sentences


def read_sentences(data: str) -> list[str]:
    """Sentences of the file `data`, or of all .txt files of the folder `data` one after the other, by name.

    Raises TaskError where there is nothing to read.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise TaskError(f"niah: data: {data} holds no .txt file; expected a folder of texts for the haystack")
    elif path.is_file():
        files = [path]
    else:
        raise TaskError(f"niah: data: {data} does not exist; expected a .txt file or a folder of .txt files")
    found: list[str] = []
    for file in files:
        try:
            found += sentences.split(file.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise TaskError(f"niah: data: {file} is not UTF-8 (byte {error.start}); convert it first") from None
    if not found:
        raise TaskError(f"niah: data: the .txt files of {data} are empty; expected texts for the haystack")
    return found
