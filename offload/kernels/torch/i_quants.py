"""I types: groups of elements looked up in a codebook as one, with signs and scales beside it.

Each decoder takes uint8 [n, block_bytes] and gives float32 [n, 256]; the arithmetic is ggml's, step by step.
Legend: 8 super-groups of 32 elements to a block, 4 octets to a super-group (8 quartets where the codebook has fours).
"""

from __future__ import annotations

import torch

from offload.kernels.torch.codebooks import codebook
from offload.kernels.torch.k_quants import iq4_xs_scales
from offload.kernels.torch.unpack import arange, fields, grouped, half, integers, nibbles, words

_SHIFT = 0.125  # what IQ1 types add to or take from every codebook value


def iq2_xxs(blocks: torch.Tensor) -> torch.Tensor:
    """Octets from 256 entries; a word per super-group has four sign indices and the scale."""
    groups = grouped(blocks[:, 2:66], 8, 8)
    control = words(groups[..., 4:], 4).squeeze(-1)
    scale = half(blocks, 0) * (0.5 + (control >> 28).float()) * 0.25
    values = codebook("IQ2_XXS", blocks.device)[groups[..., :4].int()]
    return _signed(scale.unsqueeze(-1), values, _sign_indices(control))


def iq2_xs(blocks: torch.Tensor) -> torch.Tensor:
    """Octets from 512 entries, each with its sign index; a scale for each two."""
    codes = grouped(words(blocks[:, 2:66], 2), 8, 4)
    values = codebook("IQ2_XS", blocks.device)[codes & 511]
    return _signed(_paired_scales(blocks, 66), values, _even_parity(codes >> 9))


def iq2_s(blocks: torch.Tensor) -> torch.Tensor:
    """Octets from 1024 entries, plain signs, a scale for each two."""
    index = integers(blocks, 2, 34) | fields(integers(blocks, 66, 74), 2) << 8
    values = codebook("IQ2_S", blocks.device)[index].reshape(-1, 8, 4, 8)
    signs = grouped(integers(blocks, 34, 66), 8, 4)
    return _signed(_paired_scales(blocks, 74), values, signs)


def iq3_xxs(blocks: torch.Tensor) -> torch.Tensor:
    """Quartets from 256 entries; a word per super-group has four sign indices and the scale."""
    control = words(blocks[:, 66:98], 4)
    scale = half(blocks, 0) * (0.5 + (control >> 28).float()) * 0.5
    values = codebook("IQ3_XXS", blocks.device)[integers(blocks, 2, 66)].reshape(-1, 8, 4, 8)
    return _signed(scale.unsqueeze(-1), values, _sign_indices(control))


def iq3_s(blocks: torch.Tensor) -> torch.Tensor:
    """Quartets from 512 entries, plain signs, odd scales."""
    index = integers(blocks, 2, 66) | fields(integers(blocks, 66, 74), 1) << 8
    values = codebook("IQ3_S", blocks.device)[index].reshape(-1, 8, 4, 8)
    scale = half(blocks, 0) * (1 + 2 * fields(integers(blocks, 106, 110), 4)).float()
    return _signed(scale.unsqueeze(-1), values, grouped(integers(blocks, 74, 106), 8, 4))


def iq1_s(blocks: torch.Tensor) -> torch.Tensor:
    """Octets from 2048 entries; a 16-bit word per super-group has high index bits, scale and shift."""
    control = words(blocks[:, 34:50], 2)
    high = control.unsqueeze(-1) >> arange(4, control, 3) & 7
    index = grouped(integers(blocks, 2, 34), 8, 4) | high << 8
    scale = half(blocks, 0) * (2 * (control >> 12 & 7) + 1).float()
    shift = torch.where(control & 0x8000 != 0, -_SHIFT, _SHIFT)
    values = codebook("IQ1_S", blocks.device)[index] + shift[..., None, None]
    return (scale[..., None, None] * values).flatten(1)


def iq1_m(blocks: torch.Tensor) -> torch.Tensor:
    """Octets from the same 2048 entries; the block's scale is scattered over four words."""
    control = words(blocks[:, 48:56], 2)
    pieces = (control >> 12) << arange(4, control, 4)
    block_scale = pieces.sum(-1, keepdim=True).to(torch.int16).view(torch.float16).float()
    small = (control.unsqueeze(-1) >> arange(4, control, 3)).flatten(1) & 7
    scale = (block_scale * (2 * small + 1).float()).repeat_interleave(2, dim=1).reshape(-1, 8, 4)
    high = grouped(fields(integers(blocks, 32, 48), 4), 8, 4)
    index = grouped(integers(blocks, 0, 32), 8, 4) | (high & 7) << 8
    shift = torch.where(high & 8 != 0, -_SHIFT, _SHIFT)
    values = codebook("IQ1_S", blocks.device)[index] + shift.unsqueeze(-1)
    return (scale.unsqueeze(-1) * values).flatten(1)


def iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    """Four bits into the sixteen values of IQ4_NL, a scale for each 32."""
    values = codebook("IQ4_NL", blocks.device)[nibbles(grouped(integers(blocks, 8, 136), 8, 16))].squeeze(-1)
    scale = half(blocks, 0) * iq4_xs_scales(blocks).float()
    return (scale.unsqueeze(-1) * values).flatten(1)


def _paired_scales(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """Scales of IQ2_XS and IQ2_S for every octet, [n, 8, 4]: four bits for each two octets."""
    codes = grouped(fields(integers(blocks, offset, offset + 8), 4), 8, 2)
    return ((half(blocks, 0).unsqueeze(-1) * (0.5 + codes.float())) * 0.25).repeat_interleave(2, dim=-1)


def _sign_indices(control: torch.Tensor) -> torch.Tensor:
    """Four sign octets from the low 28 bits of every word: [n, 8] -> [n, 8, 4]."""
    return _even_parity(control.unsqueeze(-1) >> arange(4, control, 7) & 127)


def _even_parity(bits: torch.Tensor) -> torch.Tensor:
    """Seven stored signs and the eighth that makes the number of minuses even."""
    folded = bits ^ bits >> 4
    folded = folded ^ folded >> 2
    return bits | (folded ^ folded >> 1 & 1) << 7 & 128


def _signed(scale: torch.Tensor, values: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """scale [n, 8, 4 or 1] * values [n, 8, 4, 8], minus where the bit of signs [n, 8, 4] is set."""
    factors = 1 - 2 * (signs.unsqueeze(-1) >> arange(8, signs) & 1)
    return (scale.unsqueeze(-1) * values * factors.float()).flatten(1)
