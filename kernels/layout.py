"""How keys and values lie in one row of the latent cache."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """One cache row is [latent | rope key], width latent_dim + rope_dim, shared by all heads of a group.

    absorbed: MLA, one group: the key is the whole row, the value is its latent.
    Otherwise a converted grouped-query model: group g owns the g-th slice of the rope part as its key and the g-th
    slice of the latent as its value. A query that is zero outside its group's slice meets only that slice, so reading
    the slice alone is the same sum with the zeros left out.
    """

    absorbed: bool
    groups: int
    latent_dim: int
    rope_dim: int

    @property
    def width(self) -> int:
        return self.latent_dim + self.rope_dim

    def keys(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [..., width] -> keys [..., g, d], a view."""
        if self.absorbed:
            return rows.unsqueeze(-2)
        return rows[..., self.latent_dim :].unflatten(-1, (self.groups, self.rope_dim // self.groups))

    def values(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [..., width] -> values [..., g, c], a view."""
        return rows[..., : self.latent_dim].unflatten(-1, (self.groups, self.latent_dim // self.groups))
