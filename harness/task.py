"""A task of the suite and how its samples are chosen and built."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.config import TaskEntry
from harness.docs import Ask, Doc, hash_of, plain
from harness.errors import HarnessError
from harness.prompts import asks_of, script_of, true_ask_of
from harness.protocol import Protocol
from harness.quiet import quiet
from harness.scorer import Scorer
from harness.selection import spread_order


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task as the suite names it: checked, with its scorer, its data not yet read.

    label: name in tables and files. name: in its YAML. where: key path of the suite entry. metadata: the YAML's
    contract. open: lm-eval's task object with its data, given the metadata that `custom_dataset` is called with.
    num_fewshot: worked examples in the prompt. installed: it is one of lm-eval's own.
    """

    label: str
    name: str
    where: str
    entry: TaskEntry
    protocol: Protocol
    scorer: Scorer
    metadata: Mapping[str, Any]
    options: Mapping[str, Any]
    open: Callable[[Mapping[str, Any]], Any]
    num_fewshot: int = 0
    installed: bool = False

    @property
    def version(self) -> str:
        return str(self.metadata.get("version", "0"))

    def docs(
        self, *, seed: int, count_tokens: Callable[[str, str], int], has_template: bool, limit: int | None = None
    ) -> tuple[Doc, ...]:
        """The samples to run, in order. count_tokens: of the full chat prompt of (user text, start of the answer).

        Raises HarnessError or TaskError where data or options cannot be used.
        """
        task = self._open(seed, count_tokens)
        rows = list(task.task_docs)
        key = self.metadata.get("id")
        ids = [str(row[key]) if key else str(index) for index, row in enumerate(rows)]
        if len(set(ids)) < len(ids):
            twice = next(name for name in ids if ids.count(name) > 1)
            raise HarnessError(f"{self.where}: {self.name} has two samples with the id {twice!r}; expected unique ids")
        order = self._order(rows, ids, seed)
        with quiet():
            return tuple(self._doc(task, rows[i], ids[i], seed, has_template) for i in order[:limit])

    def _order(self, rows: Sequence[Mapping[str, Any]], ids: Sequence[str], seed: int) -> list[int]:
        generated = bool(self.metadata.get("generated"))
        stratify = self.metadata.get("stratify")
        fields = self.metadata.get("group") or () if generated else (stratify,) if stratify else ()
        strata = [tuple(str(row[field]) for field in fields) for row in rows]
        order = spread_order(ids, strata, seed=seed, task=self.name, shuffle=not generated)
        return order if generated else order[: self.entry.samples]

    def _open(self, seed: int, count_tokens: Callable[[str, str], int]) -> Any:
        metadata = {
            **self.options,
            "seed": seed,
            "data": self.entry.data,
            "samples": self.entry.samples,
            "count_tokens": count_tokens,
            "max_tokens": self.protocol.max_tokens,
        }
        try:
            with quiet():
                return self.open(metadata)
        except IndexError:  # lm-eval looks at the first sample
            source = self.entry.data or "its data set"
            raise HarnessError(f"{self.where}: {self.name} found no samples in {source}") from None
        except ValueError as error:
            if type(error).__name__ != "TaskError":  # the tasks' own error, which this package does not import
                raise
            raise HarnessError(f"{self.where}: {error}") from error

    def _doc(self, task: Any, row: dict[str, Any], name: str, seed: int, has_template: bool) -> Doc:
        meta = self.metadata
        # ours keep text and start of the answer apart: lengths were counted so
        chat = has_template or not self.installed
        asks = asks_of(task, row, shots_seed=f"{seed}/{self.name}/{name}", has_template=chat)
        if "messages" in meta:
            asks = (Ask(messages=tuple(meta["messages"](row)), prefix=task.doc_to_prefix(row) or ""),)
        if meta.get("plain"):
            text = str(task.doc_to_text(row))
            asks = tuple(dataclasses.replace(ask, messages=(), prefix="", text=text) for ask in asks)
        tools = meta["tools"](row) if "tools" in meta else None
        if tools:
            asks = (dataclasses.replace(asks[0], tools=tuple(tools)),)
        scored = asks[0].continuation is not None
        true_ask = true_ask_of(task, row) if scored else None
        unscored = set(meta.get("unscored") or ())
        return Doc(
            id=name,
            hash=hash_of(row),
            row=plain({key: value for key, value in row.items() if key not in unscored}),
            group={field: plain(row[field]) for field in meta.get("group") or ()},
            cluster=str(row[meta["cluster"]]) if meta.get("cluster") else name,
            asks=asks,
            gold=script_of(task, row),
            wrong=meta["wrong"](row) if "wrong" in meta else "no such answer",
            gold_ask=true_ask,
            wrong_ask=None if true_ask is None or len(asks) == 1 else true_ask - 1 if true_ask else 1,
            needles=tuple(row[meta["needles"]]) if meta.get("needles") else (),
        )
