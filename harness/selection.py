"""Which samples of a task are run, in an order in which a larger number only adds."""

import hashlib
from collections.abc import Hashable, Sequence


def spread_order(ids: Sequence[str], strata: Sequence[Hashable], *, seed: int, task: str, shuffle: bool) -> list[int]:
    """Positions of the samples so that every prefix is spread evenly over the strata.

    Round by round one sample of each stratum. shuffle: within a stratum, and among the strata of a round, by the hash
    of seed, task and id (data sets); otherwise by position (generated samples, whose index is part of their name).
    """
    strata_of_ids = dict(zip(range(len(ids)), strata, strict=True))
    keys = [_hash(f"{seed}/{task}/{name}") if shuffle else "" for name in ids]
    by_stratum: dict[Hashable, int] = {}
    rounds = {}
    for index in sorted(range(len(ids)), key=lambda i: (keys[i], i)):
        stratum = strata_of_ids[index]
        rounds[index] = by_stratum.get(stratum, 0)
        by_stratum[stratum] = rounds[index] + 1
    return sorted(range(len(ids)), key=lambda i: (rounds[i], keys[i], i))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
