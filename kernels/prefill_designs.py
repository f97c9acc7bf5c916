"""The ways to run sparse prefill in plain Triton that the benchmark compares beside the one in use."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrefillDesign:
    """One way to run `sparse_prefill_triton`; it fixes a row's bits, whatever the batch.

    rows: a tile's. stages: tiles under way, the one in use included.
    ids_ahead: a tile's ids are loaded a tile early and carried along, so that its rows wait for no id.
    """

    rows: int = 64
    stages: int = 2
    ids_ahead: bool = False


PREFILL_DESIGNS = {
    "halved scores": PrefillDesign(),
    "halved scores + ids ahead": PrefillDesign(ids_ahead=True),
    "halved scores + ids ahead + 32 rows x 4": PrefillDesign(rows=32, stages=4, ids_ahead=True),
    "halved scores + ids ahead + 32 rows x 3": PrefillDesign(rows=32, stages=3, ids_ahead=True),
}
