"""The arrays behind the blocks: one key and one value cache per cache layer, bound as graph inputs that the kernels write in place.

`kv.{i}.key` is (N, G, D, P) and `kv.{i}.value` (N, G, P, E), in the type and with the widths of the layer's cache format
(custom_ops/contract.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ...custom_ops.contract import CACHE_FORMATS
from ...custom_ops.native import CopyBlocks
from ...models.spec import ModelSpec
from .tables import Copy


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    """Zeros from a multiple of 64 bytes on, so that no vector load of a kernel lies across two cache lines."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


class BlockStore:
    """Caches of N blocks for every layer of `spec`, zeroed; the operating system gives pages when they are first written."""

    def __init__(self, spec: ModelSpec, num_blocks: int, block_size: int) -> None:
        self.keys: list[NDArray[np.generic]] = []
        self.values: list[NDArray[np.generic]] = []
        for layer in spec.cache_layers:
            cache = CACHE_FORMATS[layer.cache]
            dtype = np.dtype(cache.dtype)
            self.keys.append(_aligned_zeros(cache.key_shape(num_blocks, layer.kv_heads, layer.head_size, block_size), dtype))
            self.values.append(_aligned_zeros(cache.value_shape(num_blocks, layer.kv_heads, layer.value_size, block_size), dtype))
        self._group_of = [layer.group for layer in spec.cache_layers]
        groups = range(len(spec.cache_groups))
        self._copy = [CopyBlocks([array for group, array in self._arrays() if group == g]) for g in groups]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.keys, *self.values))

    def ort_values(self) -> dict[str, ort.OrtValue]:
        """Graph input name → OrtValue over the very memory of the cache."""
        values = {}
        for i, (key, value) in enumerate(zip(self.keys, self.values)):
            values[f"kv.{i}.key"] = ort.OrtValue.ortvalue_from_numpy(key)
            values[f"kv.{i}.value"] = ort.OrtValue.ortvalue_from_numpy(value)
        return values

    def read(self, tables: Sequence[Sequence[int]]) -> list[NDArray[np.generic]]:
        """Copies of the blocks `tables[group]` of every layer: its keys, its values."""
        return [array[tables[group]] for group, array in self._arrays()]

    def write(self, tables: Sequence[Sequence[int]], arrays: Sequence[NDArray[np.generic]]) -> None:
        """What `read` gave, into other blocks."""
        for (group, array), blocks in zip(self._arrays(), arrays, strict=True):
            array[tables[group]] = blocks

    def pick(self, arrays: Sequence[NDArray[np.generic]], rows: Sequence[slice] | Sequence[list[int]]) -> list[NDArray[np.generic]]:
        """Of what `read` gave, the blocks `rows[group]`: copies, or views where it is a slice."""
        return [array[rows[group]] for (group, _), array in zip(self._arrays(), arrays, strict=True)]

    def size(self, counts: Sequence[int]) -> int:
        """Bytes of `counts[group]` blocks of every layer."""
        return sum(counts[group] * (array.nbytes // len(array)) for group, array in self._arrays())

    def shapes(self, tables: Sequence[Sequence[int]]) -> list[tuple[np.dtype[np.generic], tuple[int, ...]]]:
        """Type and shape of what `read` gives."""
        return [(array.dtype, (len(tables[group]), *array.shape[1:])) for group, array in self._arrays()]

    def _arrays(self) -> Iterator[tuple[int, NDArray[np.generic]]]:
        for group, key, value in zip(self._group_of, self.keys, self.values):
            yield group, key
            yield group, value

    def copy(self, copies: Sequence[Copy]) -> None:
        """Whole blocks, over all layers of their group; in order."""
        for group in {copy.group for copy in copies}:
            chosen = [copy for copy in copies if copy.group == group]
            self._copy[group]([copy.source for copy in chosen], [copy.target for copy in chosen])
