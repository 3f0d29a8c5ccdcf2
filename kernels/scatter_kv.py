"""The canonical wire order back to cache slots; the kernel is that of ``gather_kv``."""

from collections.abc import Sequence

from torch import Tensor

from antiphon.kernels.gather_kv import SideTable, copy_kv
from antiphon.kernels.paged_kv import PagedKV, WireKV


def scatter_kv(
    layers: Sequence[PagedKV], slots: Tensor, wire: WireKV, tables: Sequence[SideTable]
) -> None:
    """Copy KV in wire order to cache slots, converting to the cache's dtype.

    Args:
        layers: The cache; only the slots are written.
        slots: ``[num_tokens]`` int64.
        wire: Read whole.
        tables: ``make_side_tables(layers)``.

    Raises:
        ValueError: The wire has another size or lacks its scales.
    """
    copy_kv(layers, slots, wire, tables, to_wire=False)
