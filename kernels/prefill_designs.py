"""The ways to run sparse prefill in plain Triton that the benchmark compares, and which is the default."""

import dataclasses

from kernels.layout import KvLayout


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrefillDesign:
    """One way to run sparse prefill in Triton; it fixes a row's bits, whatever the batch.

    halved: a warp group computes half of a tile's scores, in `sparse_prefill_triton` where that fits; else all of them.
    ids_ahead: a tile's ids are loaded a tile early and carried along, so that its rows wait for no id; halved only.
    """

    halved: bool = False
    ids_ahead: bool = False


PREFILL_DESIGNS = {
    "whole scores": PrefillDesign(),
    "halved scores": PrefillDesign(halved=True),
    "halved scores + ids ahead": PrefillDesign(halved=True, ids_ahead=True),
}
MEASURED = (512, 64)  # latent and rope of DeepSeek-V3.2; no other width has been timed


def prefill_default(layout: KvLayout) -> PrefillDesign:
    """The fastest measured design: by the widths alone."""
    measured = (layout.latent_dim, layout.rope_dim) == MEASURED
    return PREFILL_DESIGNS["halved scores + ids ahead" if measured else "whole scores"]
