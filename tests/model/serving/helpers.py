"""Engines over small random checkpoints, and what must hold when nothing runs in them."""

from model.serving.engine import PagedEngine
from model.serving.shape import Shape
from tests.model.helpers import dsa_folder, llama_folder
from tests.model.test_engine import VARIANTS, Words

FOLDERS = {
    "deepseek-moe": lambda: dsa_folder("deepseek"),
    "glm-shared-moe": lambda: dsa_folder("glm", index_topk_pattern="FSF"),
    "llama": llama_folder,
}
FEW_ROWS = Shape(rows=4, chunk=256, granule=64, budget=256)


def served(tiny):
    return {n: a for n, a in VARIANTS.items() if tiny.config.indexer or a.topk is None or a.selector != "indexer"}


def paged(tiny, encoding=None, **options):
    return PagedEngine.of(tiny, encoding or Words(), served(tiny), **options)


def pages_for(tiny, tokens, **options):
    """Bytes of a cache that holds so many tokens for one request of one kind of storage."""
    engine = PagedEngine.of(tiny, Words(), {"dense": VARIANTS["dense"]}, cache_bytes=1 << 24, **options)
    (lane,) = engine._lanes.values()
    return (tokens // 64 + 1) * (lane.pool.num_bytes // lane.pool.num_pages)


def assert_all_pages_are_free(engine):
    for lane in engine._lanes.values():
        assert lane.pages.can_take(lane.pages.capacity)
    for decoder in engine._decoders.values():
        assert len(decoder._free) == decoder.num_rows and not decoder.places.any()
