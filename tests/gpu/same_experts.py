"""A mixture's choice of experts, noted at one run of a prompt and given to another.

Rounding moves a choice wherever two experts score about the same, and another expert moves a log-likelihood further
than all other rounding together: what two devices compute is compared under the same experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from model.layers import Gate
from model.transformer import Transformer

Hook = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor | None]  # gate's name, positions, experts


class Experts:
    """The experts of one request's tokens, layer by layer: [tokens, active] int64 by absolute position."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.chosen: dict[str, torch.Tensor] = {}

    @contextmanager
    def noted(self, model: Transformer) -> Iterator[None]:
        """Whatever `model` chooses meanwhile is kept; it must see the request's tokens and no others."""
        with _gates(model, self._note):
            yield
        for name, chosen in self.chosen.items():
            assert bool((chosen >= 0).all()), f"{name} did not see every token"

    @contextmanager
    def given(self, model: Transformer) -> Iterator[list[torch.Tensor]]:
        """`model` takes what was noted, with its own weights.

        Yields:
            By gate and step, [rows] bool: where the model would have chosen otherwise.
        """
        others: list[torch.Tensor] = []

        def give(name: str, positions: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
            given = self.chosen[name].to(experts.device)[positions.clamp_max(self.num_tokens - 1)]
            moved = (given.sort(1).values != experts.sort(1).values).any(1)
            others.append(moved[: self._rows(positions)].cpu())
            return given

        with _gates(model, give):
            yield others

    def _note(self, name: str, positions: torch.Tensor, experts: torch.Tensor) -> None:
        rows = self._rows(positions)
        kept = self.chosen.setdefault(name, torch.full((self.num_tokens, experts.shape[1]), -1))
        kept[positions[:rows].cpu()] = experts[:rows].cpu()

    def _rows(self, positions: torch.Tensor) -> int:
        """Rows before the padding: their positions count up, within the request."""
        steps = positions - positions[0] == torch.arange(len(positions), device=positions.device)
        return int((steps & (positions < self.num_tokens)).long().cumprod(0).sum())


@contextmanager
def _gates(model: Transformer, hook: Hook) -> Iterator[None]:
    """Call `hook` behind every gate with the positions of its rows; what it returns replaces the gate's choice."""
    positions: list[torch.Tensor] = []

    def placed(_: Any, given: tuple[torch.Tensor, ...]) -> None:
        positions[:] = [given[0]]

    def chosen(name: str) -> Callable[[Gate, tuple[torch.Tensor, ...], tuple[torch.Tensor, torch.Tensor]], Any]:
        def behind(gate: Gate, given: tuple[torch.Tensor, ...], out: tuple[torch.Tensor, torch.Tensor]) -> Any:
            experts = hook(name, positions[0], out[0])
            return None if experts is None else (experts, weights_of(gate, given[0], experts))

        return behind

    handles = [model.rope.register_forward_pre_hook(placed)]
    handles += [
        gate.register_forward_hook(chosen(name)) for name, gate in model.named_modules() if isinstance(gate, Gate)
    ]
    assert len(handles) > 1, "expected a model with experts"
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weights_of(gate: Gate, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Weights [n, a] float32 of given experts, as `Gate` makes them."""
    weights = torch.nn.functional.linear(x.float(), gate.weight.float()).sigmoid().gather(1, experts)
    if gate.moe.normalise:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return weights * gate.moe.scale
