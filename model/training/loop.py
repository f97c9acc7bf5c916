"""The training loop: stages in order, an event an interval, resumable to the step, stopped by a loss that is NaN."""

import dataclasses
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from model.errors import ModelError
from model.layers import MoE
from model.training.batch import Batches, HeldOut
from model.training.checkpoint import Folder, Progress, latest, resume, save
from model.training.config import StageConfig, TrainingConfig
from model.training.evaluate import evaluate
from model.training.event import EventKind, TrainingEvent
from model.training.feed import Feed, Step
from model.training.forward import TrainingForward
from model.training.losses import cross_entropy, normalised_weights
from model.training.memory import check_memory, free_bytes
from model.training.moe import balance
from model.training.optim import Optimizer, Parameters
from model.training.world import World
from model.transformer import Transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KEPT = 2  # checkpoints that can be resumed; older ones lose everything


@dataclasses.dataclass(slots=True)
class _Interval:
    """What the steps since the last log line left on the device; read in one go."""

    rows: list[torch.Tensor] = dataclasses.field(default_factory=list)  # loss, answer and rest loss, norms
    residuals: list[torch.Tensor] = dataclasses.field(default_factory=list)
    kl: list[torch.Tensor] = dataclasses.field(default_factory=list)
    loads: list[torch.Tensor] = dataclasses.field(default_factory=list)
    tokens: int = 0
    began: float = dataclasses.field(default_factory=time.perf_counter)


class Training:
    """One training of one model into one folder."""

    def __init__(
        self, model: Transformer, folder: Folder, config: TrainingConfig, corpus: Batches, held_out: Sequence[HeldOut],
        out: Path, world: World,
    ) -> None:  # fmt: skip
        self.model = model.to(world.device).train()
        self.folder = folder
        self.config = config
        self.corpus = corpus
        self.held_out = held_out
        self.out = out
        self.world = world
        self.parameters = Parameters.of(model)
        self.optimizer = Optimizer(self.parameters, config.optimizer)
        self.progress = Progress()
        dtype = DTYPES[config.precision]
        self.compiled = config.compiled and world.device.type == "cuda"
        limit = config.residual_limit or math.inf
        self.forward = TrainingForward(model, dtype=dtype, compiled=self.compiled, residual_limit=limit)
        self.checking = TrainingForward(model, dtype=dtype)
        self.peak = max((stage.main.peak for stage in config.stages if stage.main is not None), default=1.0)
        self._layers: list[int] = []

    def resume(self) -> None:
        """Go on from the latest checkpoint of the folder."""
        found = latest(self.out)
        if found is None:
            raise ModelError(f"{self.out}: no checkpoint to resume from; start without --resume")
        self.progress = resume(found, self.model, self.optimizer)

    def check(self) -> None:
        """Raise ModelError if a step of a stage that is left cannot fit the model's positions, or memory."""
        num_bytes = DTYPES[self.config.precision].itemsize
        free = free_bytes(self.world.device)
        most = self.model.config.max_positions
        for stage in self.config.stages[self.progress.stage :]:
            if stage.max_length > most:
                raise ModelError(
                    f"stages.{stage.name}.lengths: {stage.max_length} is beyond the model's {most} positions"
                )
        check_memory(
            self.model, self.config.stages, done=self.progress.stage, batch_tokens=self.config.batch_tokens,
            num_ranks=self.world.size, num_bytes=num_bytes, compiled=self.compiled, kl_rows=self.config.kl_rows,
            evaluates=bool(self.held_out), free=free,
        )  # fmt: skip

    def run(self) -> Iterator[TrainingEvent]:
        """Train; yields events (every rank does, rank 0's are worth logging). The last checkpoint is also `out`/model.

        After warm-up alone, an indexer that was added here is `out`/indexer as well.

        Raises:
            ModelError: a step cannot fit memory (before the first), or a loss is no number (the checkpoints stay).
        """
        self.check()
        if self.world.device.type == "cuda" and self.config.precision == "bfloat16":
            torch.set_float32_matmul_precision("high")  # router and indexer: TF32 is still finer than bfloat16
        while self.progress.stage < len(self.config.stages):
            yield from self._stage(self.config.stages[self.progress.stage])
        if self.world.leads:
            save(self.folder, self.model, None, self.progress, self.out / "model")
            if all(stage.kind == "warmup" for stage in self.config.stages):  # the main model is what it was
                self.folder.write_indexer(self.model, self.out / "indexer")
        self.world.wait()

    def _stage(self, stage: StageConfig) -> Iterator[TrainingEvent]:
        config, progress = self.config, self.progress
        steps = stage.num_steps(config.batch_tokens)
        for forward in (self.forward, self.checking):
            forward.plain_rope = stage.plain_rope
        if self.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.world.device)
        yield self._event("stage", stage, {"trains": stage.kind, "topk": stage.topk})
        stream = self.corpus.stream(stage.name, progress.step, self.world.share)
        feed = Feed(
            stream, self.world, kl_rows=config.kl_rows, seed=config.seed, first_step=progress.total_steps
        )  # fmt: skip
        interval = _Interval()
        checked = -1
        began: float | None = None
        try:
            for step in feed:
                share = self._share(stage, steps)
                if share >= 1.0:
                    break
                self._train(stage, step, share, interval)
                progress.step += 1
                progress.total_steps += 1
                progress.tokens += step.num_tokens
                if progress.step % config.log_every == 0:
                    yield self._flush(stage, interval)
                    interval = _Interval()
                # waiting for a batch counts; the first step of a stage does not, as it may compile
                now = time.perf_counter()
                progress.seconds += 0.0 if began is None else now - began
                began = now
                if config.eval_every and progress.step % config.eval_every == 0:
                    yield from self._evaluate(stage)
                    checked = progress.step
                    began = interval.began = time.perf_counter()
                if config.checkpoint_every and progress.step % config.checkpoint_every == 0:
                    if interval.rows:
                        yield self._flush(stage, interval)
                    yield self._save(stage)
                    interval = _Interval()
                    began = time.perf_counter()
        finally:
            feed.close()
        if interval.rows:
            yield self._flush(stage, interval)
        if checked != progress.step:
            yield from self._evaluate(stage)
        yield self._save(stage, ended=True)

    def _share(self, stage: StageConfig, steps: int | None) -> float:
        """How much of the stage is done: by steps or seconds, whichever is further."""
        share = 0.0 if steps is None else self.progress.step / steps
        if stage.seconds is not None:
            share = max(share, self.world.agree(self.progress.seconds) / stage.seconds)
        return share

    def _train(self, stage: StageConfig, step: Step, share: float, interval: _Interval) -> None:
        config = self.config
        warmup = stage.kind == "warmup"
        number = self.progress.step
        output = self.forward(
            step.token_ids,
            topk=None if stage.is_dense_step(number) else stage.topk,
            frozen=warmup,
            kl_rows=None if stage.kind == "dense" else step.kl_rows,
        )
        nothing = torch.full((), math.nan, device=step.token_ids.device)
        answer = rest = nothing
        # the sums over all rows are in the weights already; the KL is a mean of each rank's rows
        kl = torch.stack(list(output.kl.values())).sum() / self.world.size if output.kl else None
        loss = torch.zeros_like(nothing) if kl is None else kl
        if not warmup:
            weights = normalised_weights(step.weights, step.is_answer, config.rest_weight, self.world.add).roll(-1, 1)
            targets = step.token_ids.roll(-1, 1)
            losses = cross_entropy(
                output.hidden, self.model.lm_head.weight, targets.flatten(), weights.flatten(), self.forward.dtype
            )
            # a mean over each rank's rows, like the KL
            loss = loss + losses.loss + config.residual_weight * output.excess / self.world.size
            counted = (weights > 0).flatten()
            is_answer = step.is_answer.roll(-1, 1).flatten() & counted
            answer = _mean(losses.each, is_answer)
            rest = _mean(losses.each, counted & ~is_answer)
        loss.backward()
        self.world.add([p.grad for p in self.parameters.all.values() if p.grad is not None])
        norms = self.optimizer.step(stage, number, share)
        if not warmup and output.loads:
            self._balance(stage, number, share, output.loads)
            interval.loads.append(torch.stack([load.max() / load.mean() for load in output.loads.values()]).max())
        grads = [norms.get(kind, nothing) for kind in ("main", "indexer")]
        interval.rows.append(torch.stack([loss.detach(), answer, rest, nothing if kl is None else kl.detach(), *grads]))
        interval.residuals.append(output.residuals)
        if output.kl:
            self._layers = list(output.kl)
            interval.kl.append(torch.stack([each.detach() for each in output.kl.values()]))
        interval.tokens += step.num_tokens

    def _balance(self, stage: StageConfig, step: int, share: float, loads: dict[int, torch.Tensor]) -> None:
        assert stage.main is not None, "the model is trained"
        rate = self.config.optimizer.bias_rate * min(1.0, stage.main.at(step, share) / self.peak)
        self.world.add(list(loads.values()))
        blocks = self.model.blocks()
        for layer, load in loads.items():
            mixture = blocks[layer].mlp
            assert isinstance(mixture, MoE), "only mixtures count a load"
            balance(mixture.gate, load, rate)

    def _flush(self, stage: StageConfig, interval: _Interval) -> TrainingEvent:
        """One log event of an interval. Raises ModelError naming the first step and layer that is no number."""
        rows, residuals = torch.stack(interval.rows).tolist(), torch.stack(interval.residuals).tolist()
        kl = torch.stack(interval.kl).tolist() if interval.kl else [[]] * len(rows)
        for i, (row, layers, losses) in enumerate(zip(rows, residuals, kl, strict=True)):
            if not math.isfinite(row[0]):
                self._stop(stage, self.progress.step - len(rows) + i + 1, layers, losses)
        names = ("loss", "loss_answer", "loss_rest", "loss_indexer", "norm_main", "norm_indexer")
        values: dict[str, Any] = {}
        for i, name in enumerate(names):
            found = [row[i] for row in rows if math.isfinite(row[i])]
            if found:
                values[name] = math.fsum(found) / len(found)
        if interval.kl:
            mean = torch.stack(interval.kl).mean(0).tolist()
            values["kl"] = {str(layer): value for layer, value in zip(self._layers, mean, strict=True)}
        if interval.loads:
            values["load"] = float(torch.stack(interval.loads).mean())
        values["residual"] = max(max(layers) for layers in residuals)
        values["tokens_per_second"] = interval.tokens / max(time.perf_counter() - interval.began, 1e-9)
        if self.world.device.type == "cuda":
            values["peak_bytes"] = torch.cuda.max_memory_allocated(self.world.device)
        return self._event("step", stage, values)

    def _stop(self, stage: StageConfig, step: int, residuals: list[float], kl: list[float]) -> None:
        bad = [layer for layer, value in enumerate(residuals) if not math.isfinite(value)]
        where = f"layer {bad[0]} is the first whose output is no number" if bad else "every layer's output is a number"
        lost = [layer for layer, value in zip(self._layers, kl, strict=False) if not math.isfinite(value)]
        if lost and not bad:
            where = f"layer {lost[0]} is the first whose indexer's loss is no number"
        kept = latest(self.out)
        left = f"the last good checkpoint is {kept}" if kept is not None else "there is no checkpoint yet"
        raise ModelError(f"stages.{stage.name}: the loss of step {step} is no number; {where}; {left}")

    def _evaluate(self, stage: StageConfig) -> Iterator[TrainingEvent]:
        """Dense accuracy and recall; sparse accuracy too once an indexer is trained."""
        if not self.held_out or not self.world.leads:
            return
        modes = [("dense", None)] + ([("sparse", stage.topk)] if stage.topk is not None else [])
        began = time.perf_counter()
        for mode, topk in modes:
            recall = self.config.recall_topk if mode == "dense" and stage.kind != "dense" else None
            each = self.config.batch_tokens // self.world.size  # one GPU works here, with its memory
            found = evaluate(self.checking, self.held_out, topk=topk, recall_topk=recall, batch_tokens=each)
            values: dict[str, Any] = {"mode": mode, "accuracy": found.accuracy}
            if found.mass:
                values["mass"] = {str(layer): value for layer, value in found.mass.items()}
                values["oracle_mass"] = {str(layer): value for layer, value in found.oracle_mass.items()}
            values["evaluation_seconds"] = time.perf_counter() - began
            yield self._event("evaluation", stage, values)

    def _save(self, stage: StageConfig, ended: bool = False) -> TrainingEvent:
        progress = self.progress
        target = self.out / "checkpoints" / f"step-{progress.total_steps:08d}"
        event = self._event("checkpoint", stage, {"folder": target.name})
        if ended:  # a training that resumes from here starts with the next stage's first step
            progress.stage, progress.step, progress.seconds = progress.stage + 1, 0, 0.0
        if self.world.leads:
            save(self.folder, self.model, self.optimizer, progress, target)
            kept = sorted((self.out / "checkpoints").glob("step-*"))
            for old in kept[:-KEPT]:
                shutil.rmtree(old)
        self.world.wait()
        return event

    def _event(self, kind: EventKind, stage: StageConfig, values: dict[str, Any]) -> TrainingEvent:
        progress = self.progress
        steps = stage.num_steps(self.config.batch_tokens)
        counts = {"total_steps": progress.total_steps, "tokens": progress.tokens, "seconds": progress.seconds}
        return TrainingEvent(kind=kind, stage=stage.name, step=progress.step, steps=steps, values={**counts, **values})


def _mean(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Mean of the chosen values; NaN where none is chosen."""
    return (values * chosen).sum() / chosen.sum()
