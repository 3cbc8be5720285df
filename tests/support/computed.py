"""Rows of a KV cache that tell by their bytes which tokens they were computed from: no other sequence has the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from offload.sessions.chain import Chain
from offload.sessions.geometry import Bytes, Geometry, Ids
from offload.sessions.store import KVStore, Restored

GEOMETRY = Geometry(fingerprint="0123456789abcdef", kv_type="f16", num_layers=2, num_heads=3, row_nbytes=40)
_MASK = (1 << 64) - 1


class Computed:
    """The cache after these tokens. `asked` is the first position that rows were asked for."""

    def __init__(self, tokens: Sequence[int] | Ids, geometry: Geometry = GEOMETRY) -> None:
        states, state = [], 1
        for token in tokens:
            state = (state * 6364136223846793005 + int(token) + 1) & _MASK
            states.append(state)
        self._states = np.array(states, np.uint64)
        self._geometry = geometry
        self.asked = len(states)

    def rows(self, layer: int, start: int, stop: int) -> Bytes:
        self.asked = min(self.asked, start)
        geometry = self._geometry
        num_words = -(-geometry.row_nbytes // 8)
        place = np.arange(geometry.num_heads * num_words, dtype=np.uint64).reshape(geometry.num_heads, 1, num_words)
        factor = (place + np.uint64(1000 * layer)) * np.uint64(2) + np.uint64(1)
        words = self._states[start:stop].reshape(1, -1, 1) * factor
        rows: Bytes = words.view(np.uint8)[:, :, : geometry.row_nbytes]
        return rows


def restored(store: KVStore, chain: Chain, tokens: Sequence[int] | Ids) -> Restored:
    """Reads a chain; asserts that what counts as sound is what these tokens compute, in every layer."""
    geometry = store.geometry
    cache = np.zeros((geometry.num_layers, geometry.num_heads, chain.length, geometry.row_nbytes), np.uint8)

    def put(layer: int, start: int, rows: Bytes) -> None:
        cache[layer, :, start : start + rows.shape[1]] = rows

    result = store.read(chain, put)
    assert result.positions <= chain.length
    assert (result.positions == chain.length) == (not result.damage), result
    assert "\n" not in result.damage
    expected = Computed(tokens[: result.positions], geometry)
    for layer in range(geometry.num_layers):
        sound = cache[layer, :, : result.positions]
        assert (sound == expected.rows(layer, 0, result.positions)).all(), (layer, result)
    return result


def files(folder: Path) -> list[Path]:
    """All files below, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
