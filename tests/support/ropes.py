"""Every kind of rotation, by name, for heads of `dim` features; both backends are compared with a plain one on them."""

from __future__ import annotations

from offload.kernels.ops import Rope


def ropes(dim: int) -> dict[str, Rope]:
    return {
        "halves": Rope(dims=dim, theta=100.0),
        "neighbours": Rope(dims=dim, theta=100.0, interleaved=True),
        "partial": Rope(dims=6, theta=100.0),
        "partial-neighbours": Rope(dims=6, theta=100.0, interleaved=True),
        "linear": Rope(dims=dim, theta=100.0, frequency_scale=0.25),
        "factors": Rope(dims=dim, theta=100.0, factors="factors"),
        "magnitude": Rope(dims=dim, theta=100.0, factors="factors", magnitude=1.5, interleaved=True),
        "everything": Rope(
            dims=dim, theta=1e4, factors="factors", magnitude=1.5, interleaved=True, frequency_scale=0.5
        ),
    }
