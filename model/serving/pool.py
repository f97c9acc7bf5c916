"""Storage of a paged cache: latent rows and index keys of all layers, in pages of 64 tokens."""

import torch

from kernels.fp8 import simulate_e4m3
from kernels.fp8_cache import PAGE, pack_rows, row_bytes, unpack_rows
from kernels.index_scores_paged import page_bytes, read_index_pages
from kernels.layout import KvLayout
from model.config import ModelConfig
from model.request import IndexDtype

# page 0 belongs to nobody: rows of padding are written there, and tables are filled up with it
SCRATCH = 0


class LayerPages:
    """One layer's pages.

    latent: [p, 64, width] in the model's dtype, or packed [p, 64, row_bytes] uint8 (`kernels.fp8_cache`).
    index: keys by precision, none where the layer has no indexer of its own: planar pages (`page_bytes`) for FP8, else
    [p, 64, d] in bfloat16 or float32. All of it begins as zeros: what no one has written yet must be finite.
    """

    def __init__(
        self,
        layout: KvLayout,
        num_pages: int,
        dtype: torch.dtype,
        packed: bool,
        index_dim: int,
        index_dtypes: tuple[IndexDtype, ...],
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.dtype = dtype
        self.packed = packed
        width, kind = (row_bytes(layout), torch.uint8) if packed else (layout.width, dtype)
        self.latent = torch.zeros(num_pages, PAGE, width, dtype=kind, device=device)
        self.index: dict[IndexDtype, torch.Tensor] = {}
        for name in index_dtypes:
            shape, kind = _index_page(name, index_dim)
            self.index[name] = torch.zeros(num_pages, *shape, dtype=kind, device=device)

    @property
    def flat(self) -> torch.Tensor:
        """The latent rows as one list: slot 64 * page + place."""
        return self.latent.flatten(0, 1)

    def write(self, slots: torch.Tensor, rows: torch.Tensor, *, rounded: bool) -> None:
        """Rows [n, width] into slots [n] int64; rounded: the latent part goes through e4m3 first."""
        if self.packed:
            rows = pack_rows(rows, self.layout)
        elif rounded:
            latent, rope = rows.split((self.layout.latent_dim, self.layout.rope_dim), -1)
            rows = torch.cat((simulate_e4m3(latent), rope), -1)
        self.flat.index_copy_(0, slots, rows)

    def rows(self, pages: torch.Tensor) -> torch.Tensor:
        """The tokens of these pages [m] int64 in order, a copy: [64 m, width] in the model's dtype."""
        rows = self.latent.index_select(0, pages).flatten(0, 1)
        return unpack_rows(rows, self.layout, self.dtype) if self.packed else rows

    def index_keys(
        self, name: IndexDtype, pages: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The first `length` keys of these pages, [length, d], and for FP8 their scales [length], else None."""
        store = self.index[name]
        if store.dtype == torch.uint8:
            return read_index_pages(store, pages, length)
        return store.index_select(0, pages).flatten(0, 1)[:length], None


class PagePool:
    """Pages of all layers; a page number means the same 64 tokens in each of them."""

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        *,
        dtype: torch.dtype,
        packed: bool,
        index_dtypes: tuple[IndexDtype, ...],
        device: torch.device,
    ) -> None:
        """packed: latent rows in FP8 with their scales. index_dtypes: precisions of index keys to keep room for."""
        self.num_pages = num_pages
        self.packed = packed
        self.dtype = dtype
        layout = layout_of(config)
        self.layers = []
        for i in range(config.num_layers):
            own = config.indexer is not None and config.indexer.own[i]
            dim = config.indexer.head_dim if config.indexer is not None else 0
            self.layers.append(LayerPages(layout, num_pages, dtype, packed, dim, index_dtypes if own else (), device))

    @property
    def num_bytes(self) -> int:
        tensors = [t for layer in self.layers for t in (layer.latent, *layer.index.values())]
        return sum(t.numel() * t.element_size() for t in tensors)


def layout_of(config: ModelConfig) -> KvLayout:
    return KvLayout(
        absorbed=config.absorbs, groups=config.groups, latent_dim=config.kv_lora_rank, rope_dim=config.rope_dim
    )


def takes_packed(config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether FP8 rows hold exactly what rounding leaves: the rope key is bfloat16 in them, fields are whole."""
    layout = layout_of(config)
    return dtype == torch.bfloat16 and layout.latent_dim % 16 == 0 and row_bytes(layout) % 4 == 0


def pool_page_bytes(config: ModelConfig, dtype: torch.dtype, packed: bool, index_dtypes: tuple[IndexDtype, ...]) -> int:
    """Bytes of one page over all layers."""
    layout = layout_of(config)
    own = sum(config.indexer.own) if config.indexer is not None else 0
    latent = PAGE * (row_bytes(layout) if packed else layout.width * dtype.itemsize)
    index = 0
    for name in index_dtypes if config.indexer is not None else ():
        assert config.indexer is not None
        shape, kind = _index_page(name, config.indexer.head_dim)
        index += torch.Size(shape).numel() * kind.itemsize
    return latent * config.num_layers + index * own


def _index_page(name: IndexDtype, dim: int) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a page of index keys. FP8 keys of an odd width are kept as what rounding left, in float32."""
    if name == "fp8" and dim % 16 == 0:
        return (page_bytes(dim),), torch.uint8
    return (PAGE, dim), torch.bfloat16 if name == "bfloat16" else torch.float32
