"""The `corpus` part of a training config."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from harness.errors import HarnessError
from tasks.dialogues.mixture import KINDS


class Phase(BaseModel):
    """Lengths of the steps before `until`; shares are relative. The last phase of a stage has no `until`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    until: int | None = Field(None, gt=0)
    mix: dict[int, float]

    @field_validator("mix")
    @classmethod
    def _mix_is_usable(cls, mix: dict[int, float]) -> dict[int, float]:
        if not mix or min(mix) < 64 or min(mix.values()) < 0 or sum(mix.values()) <= 0:
            raise ValueError(f"expected shares of lengths of at least 64 tokens, got {mix}")
        return mix


class CorpusConfig(BaseModel):
    """books: folder of .txt files for haystacks and plain text. held_out_books: their names, never trained on.

    tokens: of one step, whatever its length. made_up: share of made-up words. lengths: phases of every stage.
    dialogues: factors of the mixture's shares by kind, absent kinds are left out; None is the whole mixture.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    books: Path
    held_out_books: tuple[str, ...] = ("pride_and_prejudice",)
    tokens: int = Field(65_536, gt=0)
    made_up: float = Field(0.35, ge=0, le=1)
    dialogues: dict[str, float] | None = None
    lengths: dict[str, tuple[Phase, ...]]

    @field_validator("dialogues")
    @classmethod
    def _kinds_are_known(cls, dialogues: dict[str, float] | None) -> dict[str, float] | None:
        return check_kinds(dialogues)

    @field_validator("lengths")
    @classmethod
    def _phases_are_in_order(cls, lengths: dict[str, tuple[Phase, ...]]) -> dict[str, tuple[Phase, ...]]:
        for stage, phases in lengths.items():
            ends = [phase.until for phase in phases]
            known = [end for end in ends[:-1] if end is not None]
            if not ends or ends[-1] is not None or len(known) < len(ends) - 1 or known != sorted(set(known)):
                raise ValueError(f"{stage}: expected rising `until` in all phases but the last, got {ends}")
        return lengths


def check_kinds(dialogues: dict[str, float] | None) -> dict[str, float] | None:
    """The factors as they came. Raises ValueError for kinds that the mixture lacks, and where nothing would be left."""
    if dialogues is None:
        return None
    unknown = sorted(set(dialogues) - set(KINDS))
    if unknown:
        raise ValueError(f"expected kinds of dialogues among {', '.join(KINDS)}, got {unknown[0]!r}")
    if not dialogues or min(dialogues.values()) < 0 or not any(dialogues.values()):
        raise ValueError(f"expected factors of at least one kind, none below 0, got {dialogues}")
    return dialogues


def book_files(config: CorpusConfig) -> tuple[list[Path], list[Path]]:
    """(training books, held-out books) by name. Raises HarnessError where there is nothing to train on."""
    if not config.books.is_dir():
        raise HarnessError(f"corpus.books: {config.books} is no folder; expected one with .txt files")
    files = sorted(config.books.glob("*.txt"))
    held_out = [file for file in files if file.stem in config.held_out_books]
    training = [file for file in files if file not in held_out]
    missing = sorted(set(config.held_out_books) - {file.stem for file in held_out})
    if missing:
        raise HarnessError(f"corpus.held_out_books: no {missing[0]}.txt in {config.books}")
    if not training:
        raise HarnessError(f"corpus.books: {config.books} holds no .txt file to train on")
    return training, held_out
