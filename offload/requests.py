"""What callers write, as the options that the engine works with: checked once, here, with the names that people use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

from offload.config import GenerationConfig, LoadConfig, SamplingConfig
from offload.errors import UsageError

_SAMPLING: Final = frozenset(field.name for field in fields(SamplingConfig))


def make_config(
    *, ram: str | int | None = None, vram: str | int | None = None, kv_ram: str | int | None = None, **options: Any
) -> LoadConfig:
    """A `LoadConfig` from the spellings that people use.

    Raises:
        UsageError: a value is not one.
    """
    parsed_vram, parsed_kv = LoadConfig.parse_ram(vram), LoadConfig.parse_ram(kv_ram)
    if parsed_vram == "minimum" or parsed_kv == "minimum":
        raise UsageError(f"{'vram' if parsed_vram == 'minimum' else 'kv_ram'}: give a size such as 8GiB")
    return LoadConfig(ram=LoadConfig.parse_ram(ram), vram=parsed_vram, kv_ram=parsed_kv, **options)


def make_request(options: Mapping[str, Any]) -> GenerationConfig:
    """A `GenerationConfig` from flat options: `max_tokens=64, temperature=0, stop=["\\n"]`.

    Raises:
        UsageError: unknown option, or a value out of range.
    """
    sampling = {name: value for name, value in options.items() if name in _SAMPLING}
    general = {name: value for name, value in options.items() if name not in _SAMPLING}
    if isinstance(general.get("stop"), str):
        general["stop"] = (general["stop"],)
    try:
        if "stop" in general:
            general["stop"] = tuple(general["stop"])
        return GenerationConfig(sampling=SamplingConfig(**sampling), **general)
    except TypeError as error:
        raise UsageError(f"generation options: {error}") from None
