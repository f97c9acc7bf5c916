"""Attention over gathered keys: each query reads only the rows it selected."""

import torch

from kernels.layout import KvLayout

GATHER_BYTES = 32 << 20  # rows gathered at a time


def sparse_mla_reference(
    q: torch.Tensor, kv: torch.Tensor, ids: torch.Tensor, layout: KvLayout, scale: float
) -> torch.Tensor:
    """Plain meaning of `sparse_mla`: one softmax per query and head over the valid ids; float32, a loop."""
    s, h, _ = q.shape
    keys, values = layout.keys(kv.float()), layout.values(kv.float())
    out = torch.zeros(s, h, values.shape[-1])
    for i in range(s):
        chosen = ids[i][ids[i] >= 0].long()
        for j in range(h):
            group = j // (h // layout.groups)
            if len(chosen):
                weights = (keys[chosen, group] @ q[i, j].float() * scale).softmax(0)
                out[i, j] = weights @ values[chosen, group]
    return out


def sparse_mla(q: torch.Tensor, kv: torch.Tensor, ids: torch.Tensor, layout: KvLayout, scale: float) -> torch.Tensor:
    """Attend to the selected rows of the latent cache.

    Args:
        q: queries in the cache's basis, [s, h, d] (absorbed for MLA).
        kv: latent cache, [t, layout.width].
        ids: rows to read, [s, k], int32, -1 is padding; never a future row, no row twice.
        layout: where keys and values lie in a row.
        scale: softmax scale of the MHA form.

    Returns:
        [s, h, c] in q's dtype; a query whose ids are all -1 gets zeros. Softmax in float32.
        Peak memory: 32 MiB of gathered rows (or one query's) beside the inputs.
    """
    s, h, _ = q.shape
    k = ids.shape[1]
    g = layout.groups
    out = torch.empty(s, h, layout.latent_dim // g, dtype=q.dtype, device=q.device)
    step = max(1, GATHER_BYTES // (k * layout.width * kv.element_size()))
    for top in range(0, s, step):
        chosen = ids[top : top + step]
        b = chosen.shape[0]
        valid = chosen >= 0
        rows = kv.index_select(0, chosen.clamp_min(0).flatten()).view(b, k, layout.width)
        keys = layout.keys(rows).permute(0, 2, 3, 1)  # [b, g, d, k]
        values = layout.values(rows).permute(0, 2, 1, 3)  # [b, g, k, c]
        queries = q[top : top + step].unflatten(1, (g, h // g))  # [b, g, m, d]
        scores = torch.matmul(queries, keys).float() * scale
        scores.masked_fill_(~valid[:, None, None, :], float("-inf"))
        weights = torch.softmax(scores, -1).nan_to_num_(0.0) if not bool(valid.all()) else torch.softmax(scores, -1)
        out[top : top + step] = torch.matmul(weights.to(q.dtype), values).flatten(1, 2)
    return out
