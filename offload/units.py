"""Sizes, rates and times as people write and read them. Knows nothing of what they measure."""

from __future__ import annotations

import re
from typing import Final

from offload.errors import UsageError

KIB: Final = 1024
MIB: Final = 1024**2
GIB: Final = 1024**3
PAGE: Final = 4096  # direct I/O offset, length and address granularity that every supported file system accepts

_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})\s*([kmgt]?)(i?b|)\s*", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str | int) -> int:
    """Bytes of `3GiB`, `3G`, `3000M`, `512k` or a plain number.

    All units are powers of 1024, as in the kernel's own limits: `3G`, `3GB` and `3GiB` are the same.

    Raises:
        UsageError: not a size, or negative.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise UsageError(f"size {text}: a size cannot be negative")
        return text
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise UsageError(f"size {text!r}: expected a number with a unit, such as 3GiB, 3000M or 512k")
    number, unit, _ = match.groups()
    return int(float(number) * KIB ** _POWER[unit.lower()])


def format_size(nbytes: float) -> str:
    """`1.50 GiB`, `312 MiB`, `4.0 KiB`, `17 B`: three significant figures, powers of 1024."""
    sign, value = ("-" if nbytes < 0 else ""), abs(nbytes)
    if value < 1023.5:
        return f"{sign}{value:.0f} B"
    units = ["KiB", "MiB", "GiB", "TiB"]
    value /= KIB
    while value >= 1023.5 and len(units) > 1:
        value /= KIB
        units.pop(0)
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{sign}{value:.{digits}f} {units[0]}"


def format_rate(bytes_per_second: float) -> str:
    """`1.43 GB/s`: decimal, as drive and memory vendors state bandwidth."""
    for unit, scale in (("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)):
        if bytes_per_second >= scale:
            return f"{bytes_per_second / scale:.3g} {unit}"
    return f"{bytes_per_second:.0f} B/s"


def format_speed(tokens_per_second: float) -> str:
    """`8.32 tokens/s`, `1052 tokens/s`: three significant figures, and never an exponent."""
    digits = 0 if tokens_per_second >= 99.95 else 1 if tokens_per_second >= 9.995 else 2
    small = f"{tokens_per_second:.3g}" if tokens_per_second < 0.995 else f"{tokens_per_second:.{digits}f}"
    return f"{small} tokens/s"


def format_duration(seconds: float) -> str:
    """`85 ms`, `4.2 s`, `3 min 10 s`, `2 h 05 min`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def align_down(value: int, granularity: int = PAGE) -> int:
    """The largest multiple of `granularity` that is not above `value`."""
    return value - value % granularity


def align_up(value: int, granularity: int = PAGE) -> int:
    """The smallest multiple of `granularity` that is not below `value`."""
    return -(-value // granularity) * granularity
