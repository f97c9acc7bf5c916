"""Which form a prompt's queries take on a GPU: a committed table by absolute query position.

dense: every visible key, in the MHA form; up to k keys the selection is all of them. masked: the MHA form under the
selection's mask. gathered: each query reads its selected latent rows. The two MHA forms cost 3.4 times fewer products
a (query, key) pair but read every pair, so they win where the context is short. Never a function of batch, chunk or
a run-time measurement: the same row has the same bits. `dsa-eval bench attention` measures whether the table is right.
"""

from typing import Literal

Form = Literal["dense", "masked", "gathered"]
FORMS: tuple[Form, ...] = ("dense", "masked", "gathered")
TABLE_K = 2048  # DeepSeek-V3.2's k and widths, for which the table is made
# the first position that gathers, a multiple of 2,048. On an H100, with projections, scores and choice, 2,048 queries
# take 3.2 to 3.3 ms gathered at any context; without a mask 1.5 / 2.3 / 3.0 ms at 4k / 6k / 8k keys (commit ce1ff39)
MASKED_UNTIL = 6144


def prefill_form(position: int, k: int = TABLE_K, cost: float = 1.0) -> Form:
    """The form of the query at this position, 0 for the first token.

    Args:
        k: keys that it selects; the bound on masks grows with it.
        cost: products of a gathered key over those of a masked one, in units of what they are at V3.2's widths.

    Raises:
        ValueError: a negative position or a k below 1.
    """
    if position < 0 or k < 1:
        raise ValueError(f"prefill_form: expected a position of at least 0 and k of at least 1, got {position} and {k}")
    if position < k:
        return "dense"
    return "masked" if position * TABLE_K < MASKED_UNTIL * k * cost else "gathered"
