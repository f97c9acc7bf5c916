"""One YAML file describes one experiment: its schema, its digest, and errors that say which key is wrong."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """See design: name, model, variants, tasks, recall, compare, seed.

    Methods for the runner: `load_config(path) -> Config`, `digest(config) -> str`,
    `config.engines() -> tuple[tuple[ModelChoice, dict[str, Attention]], ...]` (one per distinct model, its variants).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
