"""How fast stored conversations are written and read back, beside what the disk does with the same bytes.

    python benchmarks/sessions_store.py /tmp/bench/store --tokens 16384

Rows are those of an 8B model: 32 layers, 8 heads, 128 numbers of 16 bits for key and value. The store's times include fsync,
checksums and a copy into memory. The probe writes one file of the same bytes in pieces of 8 MiB and syncs it, and reads the
store's files with direct reads of 8 MiB, two at a time; it alternates with the store, since the host changes.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
from harness.peers import drop_page_cache
from harness.results import ROOT, table, write

from offload.sessions.chain import Chain
from offload.sessions.geometry import Bytes, Geometry
from offload.sessions.store import KVStore
from offload.units import MIB, format_rate, format_size

GEOMETRY: Final = Geometry(fingerprint="0123456789abcdef", kv_type="f16", num_layers=32, num_heads=8, row_nbytes=512)
HEADER: Final = ["", "store", "disk", "share"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="on the disk in question; what is written there is removed")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--turn", type=int, default=256, help="tokens of a turn, for the last line")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    rounds = [one_round(options.folder, options.tokens, options.turn) for _ in range(options.rounds)]
    middle = {name: median(times[name] for times in rounds) for name in rounds[0]}
    nbytes = options.tokens * GEOMETRY.num_tables * GEOMETRY.row_nbytes
    rows = [
        [name, format_rate(nbytes / middle[name]), format_rate(nbytes / middle[f"{name} probe"]),
         f"{median(times[f'{name} probe'] / times[name] for times in rounds):.0%}"]
        for name in ("write", "read")
    ]  # fmt: skip
    body = (
        f"{options.tokens} tokens, {format_size(nbytes)}; medians of {options.rounds} rounds.\n\n{table(HEADER, rows)}\n\n"
        f"A turn of {options.turn} tokens is durable in {middle['turn'] * 1000:.0f} ms; "
        f"the chain is found in {middle['find'] * 1000:.1f} ms."
    )
    print(f"{body}\n\n{write('sessions_store', body, folder=options.results)}")


def one_round(folder: Path, num_tokens: int, turn: int) -> dict[str, float]:
    """Seconds of each step, in a new store."""
    shutil.rmtree(folder, ignore_errors=True)
    cache = np.random.default_rng(1).integers(
        0, 256, (GEOMETRY.num_heads, num_tokens + turn, GEOMETRY.row_nbytes), np.uint8
    )
    tokens = np.arange(num_tokens + turn) % 50_000

    def rows(_: int, start: int, stop: int) -> Bytes:
        part: Bytes = cache[:, start:stop]
        return part

    def put(_: int, start: int, part: Bytes) -> None:
        cache[:, start : start + part.shape[1]] = part

    store = KVStore(folder, GEOMETRY, 1 << 50)
    times = {"write": seconds(lambda: store.extend(Chain(), tokens[:num_tokens], rows))}
    times["write probe"] = seconds(lambda: probe_write(folder / "probe", num_tokens * GEOMETRY.num_tables * 512))
    drop_page_cache()
    times["find"] = seconds(lambda: store.find(tokens))
    chain = store.find(tokens)
    times["read"] = seconds(lambda: store.read(chain, put))
    times["read probe"] = seconds(lambda: probe_read([link.file.path for link in chain.links]))
    times["turn"] = seconds(lambda: store.extend(chain, tokens, rows))
    store.close()
    shutil.rmtree(folder)
    return times


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def probe_write(path: Path, nbytes: int) -> None:
    data = np.random.default_rng(2).bytes(8 * MIB)
    with path.open("wb", buffering=0) as file:
        for start in range(0, nbytes, len(data)):
            file.write(data[: nbytes - start])
        os.fsync(file.fileno())


def probe_read(paths: list[Path]) -> None:
    with ThreadPoolExecutor(2) as pool:
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
            size = os.fstat(descriptor).st_size
            halves = [range(start, size, 16 * MIB) for start in (0, 8 * MIB)]
            list(pool.map(lambda offsets, fd=descriptor: _read(fd, offsets), halves))
            os.close(descriptor)


def _read(descriptor: int, offsets: range) -> None:
    with mmap.mmap(-1, 8 * MIB) as buffer:
        for offset in offsets:
            os.preadv(descriptor, [buffer], offset)


if __name__ == "__main__":
    main()
