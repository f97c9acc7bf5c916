"""AdamW over two sets of parameters that never share a gradient: the main model and the indexers."""

import dataclasses

import torch

from model.training.config import OptimizerConfig, StageConfig
from model.transformer import Transformer

INDEXER = ".indexer."


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Trainable tensors by name; `indexer` are those of the indexers, `main` all others (a tied head once)."""

    main: dict[str, torch.Tensor]
    indexer: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: Transformer) -> "Parameters":
        named = dict(model.named_parameters())
        return cls(
            main={name: p for name, p in named.items() if INDEXER not in name},
            indexer={name: p for name, p in named.items() if INDEXER in name},
        )

    @property
    def all(self) -> dict[str, torch.Tensor]:
        return {**self.main, **self.indexer}


class Optimizer:
    """One AdamW with four groups: (main, indexer) x (matrices with decay, vectors without)."""

    def __init__(self, parameters: Parameters, config: OptimizerConfig) -> None:
        self.parameters = parameters
        self.config = config
        groups = []
        for kind, tensors, betas in (
            ("main", parameters.main, config.betas),
            ("indexer", parameters.indexer, config.indexer_betas),
        ):
            for decayed in (True, False):
                chosen = [p for p in tensors.values() if (p.dim() >= 2) == decayed]
                decay = config.weight_decay if decayed else 0.0
                groups.append({"params": chosen, "kind": kind, "betas": betas, "weight_decay": decay})
        on_gpu = next(iter(parameters.all.values())).is_cuda
        self.adamw = torch.optim.AdamW(groups, lr=0.0, eps=config.eps, fused=on_gpu)

    def step(self, stage: StageConfig, step: int, share: float) -> dict[str, torch.Tensor]:
        """Clip each set, update what has gradients, forget the gradients -> gradient norm of each set, unsynchronised.

        step: 0-based within the stage; share: how much of the stage is done, 0..1.
        """
        norms: dict[str, torch.Tensor] = {}
        for kind, tensors, schedule in (
            ("main", self.parameters.main, stage.main),
            ("indexer", self.parameters.indexer, stage.indexer),
        ):
            present = [p for p in tensors.values() if p.grad is not None]
            if present:
                norms[kind] = torch.nn.utils.clip_grad_norm_(present, self.config.clip)
            for group in self.adamw.param_groups:
                if group["kind"] == kind:
                    group["lr"] = 0.0 if schedule is None else schedule.at(step, share)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norms

    def state(self) -> dict[str, torch.Tensor]:
        """Moments and step counts by parameter name, for a safetensors file."""
        out = {}
        for name, parameter in self.parameters.all.items():
            for key, value in self.adamw.state.get(parameter, {}).items():
                out[f"{key}/{name}"] = torch.as_tensor(value).detach().clone()
        return out

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.all.items():
            found = {
                key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors
            }
            if found:
                on_gpu = parameter.is_cuda
                self.adamw.state[parameter] = {
                    key: value.to(parameter.device) if key != "step" or on_gpu else value
                    for key, value in found.items()
                }
