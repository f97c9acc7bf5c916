"""Who holds which page: counted references, and prompts' beginnings that are kept for whoever begins the same."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from model.serving.pool import SCRATCH


class Pages:
    """Page numbers of one pool. Beginnings of prompts stay as long as nobody needs their pages."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._free = [page for page in range(num_pages - 1, -1, -1) if page != SCRATCH]
        self._prefixes: OrderedDict[bytes, list[int]] = OrderedDict()  # the least recently used first

    @property
    def capacity(self) -> int:
        """Pages that one request can hold at most."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages that nobody holds, kept beginnings not counted."""
        return len(self._free)

    def can_take(self, count: int) -> bool:
        """Whether `count` pages are free, or would be if kept beginnings were given up."""
        free = len(self._free)
        for pages in self._prefixes.values():
            if count <= free:
                break
            free += len(pages) if self._only_kept(pages) else 0
        return count <= free

    def take(self, count: int) -> list[int]:
        """`count` fresh pages; `can_take` has been asked. Kept beginnings go, the longest unused first."""
        while len(self._free) < count:
            key = next(key for key, pages in self._prefixes.items() if self._only_kept(pages))
            self.release(self._prefixes.pop(key))
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._references[page] = 1
        return taken

    def hold(self, pages: Sequence[int]) -> None:
        """One more holder of each of these pages."""
        for page in pages:
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less; a page that nobody holds is free."""
        for page in pages:
            self._references[page] -= 1
            assert self._references[page] >= 0, f"page {page} was released twice"
            if self._references[page] == 0:
                self._free.append(page)

    def keep(self, key: bytes, pages: Sequence[int]) -> None:
        """Remember the pages of a part of a prompt under the key of all that came up to its end."""
        if key not in self._prefixes:
            self.hold(pages)
            self._prefixes[key] = list(pages)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Pages of the longest known run of parts, held once more for the caller."""
        found: list[list[int]] = []
        for key in keys:
            if key not in self._prefixes:
                break
            found.append(self._prefixes[key])
        for key in reversed(keys[: len(found)]):  # a beginning is given up after what follows it
            self._prefixes.move_to_end(key)
        pages = [page for run in found for page in run]
        self.hold(pages)
        return pages

    def _only_kept(self, pages: Sequence[int]) -> bool:
        return all(self._references[page] == 1 for page in pages)


def prefix_keys(kind: str, ids: Sequence[int], unit: int, limit: int) -> list[bytes]:
    """One key for each whole unit of ids[:limit]: it names `kind` and every token up to the unit's end."""
    keys = []
    digest = hashlib.sha256(kind.encode())
    for start in range(0, limit // unit * unit, unit):
        digest.update(np.asarray(ids[start : start + unit], dtype=np.int64).tobytes())
        keys.append(digest.digest())
    return keys
