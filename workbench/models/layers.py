"""What both architectures are built of: RMSNorm, rotary positions, the gated MLP, and how padding becomes positions."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.config import ModelConfig, RopeConfig
from workbench.errors import ShapeError
from workbench.hooks import HookPoint

_LARGE = 32_768  # values of a weight from which on its bytes, not the calls, are the time of a step


class Frame(NamedTuple):
    """What a forward pass knows about its positions, computed once and handed to every block."""

    cos: Tensor  # [batch pos 1 d_head], or [1 pos 1 d_head] without padding
    sin: Tensor  # same, its first half negated: what the second half of a head takes away from the first
    mask: Tensor | None  # bool [batch 1 query_pos key_pos], True where a query may look; None: causal, nothing padded
    valid: Tensor | None  # bool [batch pos], False at padding; None: nothing padded
    positions: Tensor  # int64 [batch pos], or [1 pos] without padding: the place of each token in its sequence


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the division in float32 (1910.07467)."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d_model))
        self.hook_scale = HookPoint("batch pos 1", dtype="wide")
        self.hook_normalized = HookPoint("batch pos d_model")

    def forward(self, x: Tensor) -> Tensor:  # [batch pos d_model]
        if not (self.hook_scale.listened or self.hook_normalized.listened):
            return rms_norm(x, self.weight, self.eps)
        inverse = inverse_rms(x, self.eps)
        if self.hook_scale.listened:
            scale = 1 / inverse
            read = 1 / scale  # before the hook, which may edit in place
            inverse = substitute(inverse, 1 / self.hook_scale(scale), read)
        return self.weight * self.hook_normalized((wide(x) * inverse).to(x.dtype))


class Linear(nn.Linear):
    """A linear map without bias.

    A step of 2 to 4 sequences in float32 on a CPU multiplies from the other side, where MKL on an AMD EPYC streams
    large weights faster (tests/benchmarks/decode_parts.py). It rounds otherwise in the last bit.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [... d_in] -> [... d_out]
        step = x.ndim == 3 and x.shape[1] == 1 and 1 < x.shape[0] <= 4
        if step and self.weight.numel() >= _LARGE and x.dtype == torch.float32 and x.device.type == "cpu":
            return torch.mm(self.weight, x[:, 0].t()).t().contiguous().unsqueeze(1)
        return F.linear(x, self.weight)


class SwiGLU(nn.Module):
    """The dense MLP: down(silu(gate x) * up x) (2002.05202)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(cfg.d_model, cfg.d_mlp)
        self.up_proj = Linear(cfg.d_model, cfg.d_mlp)
        self.down_proj = Linear(cfg.d_mlp, cfg.d_model)
        self.hook_pre = HookPoint("batch pos d_mlp")
        self.hook_pre_linear = HookPoint("batch pos d_mlp")
        self.hook_post = HookPoint("batch pos d_mlp")

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:  # [batch pos d_model]
        gate = F.silu(self.hook_pre(self.gate_proj(x)))
        return self.down_proj(self.hook_post(gate * self.hook_pre_linear(self.up_proj(x))))


def wide(x: Tensor) -> Tensor:
    """x in float32 at least, as the checkpoints were trained. In a float64 model only rotary angles are float32."""
    return x if x.dtype == torch.float32 else x.to(torch.promote_types(x.dtype, torch.float32))


def inverse_rms(x: Tensor, eps: float) -> Tensor:  # [... d] -> float32 [... 1]
    return torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # over the last axis
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        # the same operations in one call; elsewhere it rounds otherwise
        return F.rms_norm(x, weight.shape, weight, eps)
    return weight * (wide(x) * inverse_rms(x, eps)).to(x.dtype)


def substitute(exact: Tensor, edited: Tensor, read: Tensor) -> Tensor:
    """`exact`, moved by what a hook made of `read`: bit-equal to `exact` if the hook changed nothing.

    For tensors that are derived only to be shown (a scale from its inverse, heads apart from their sum): computing on
    with the derived ones would change the last bit. The gradient flows through `edited`.
    """
    return exact.detach() + (edited - read.detach())


def rotary(x: Tensor, frame: Frame) -> Tensor:  # [batch pos head d_head]
    """Rotate the two halves of each head against each other (2104.09864)."""
    return x * frame.cos + x.roll(x.shape[-1] // 2, dims=-1) * frame.sin


@cache
def rotary_frequencies(rope: RopeConfig, d_head: int, device: torch.device) -> Tensor:  # float32 [d_head / 2]
    """Radians per position of each rotary pair; kept per device, so that a forward pass copies nothing to it."""
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, d_head, 2, dtype=torch.float32, device="cpu") / d_head))
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    if rope.kind == "llama3":
        frequencies = _llama3_frequencies(rope, frequencies)
    return frequencies.to(device)


def _llama3_frequencies(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / frequencies
    longest, shortest = rope.original_n_ctx / rope.low_freq_factor, rope.original_n_ctx / rope.high_freq_factor
    blend = (rope.original_n_ctx / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    stretched = torch.where(wavelength > longest, frequencies / rope.factor, frequencies)
    return torch.where((wavelength <= longest) & (wavelength >= shortest), blended, stretched)


def check_tokens(tokens: Tensor, cfg: ModelConfig) -> None:
    """Raises ShapeError unless tokens are integers [batch pos] within the vocabulary."""
    if not isinstance(tokens, Tensor):
        raise ShapeError(
            f"tokens: expected a tensor [batch pos], got {type(tokens).__name__}. Use torch.tensor([ids])."
        )
    if tokens.ndim != 2 or 0 in tokens.shape or tokens.dtype not in (torch.int32, torch.int64):
        raise ShapeError(
            f"tokens: expected integers [batch pos], int64 or int32, got {tuple(tokens.shape)} {tokens.dtype}."
            " One sequence is tokens[None]."
        )
    # a range check on a GPU tensor would wait for the device; tokens come from the host in practice
    if tokens.device.type == "cpu" and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < cfg.d_vocab:
        raise ShapeError(
            f"tokens: expected ids from 0 to {cfg.d_vocab - 1}, got {int(tokens.min())} to {int(tokens.max())}. "
            "Use the tokenizer of this checkpoint."
        )


def check_mask(attention_mask: Tensor, shape: tuple[int, int], may_be_empty: bool = False) -> Tensor:
    """The mask as bool [batch pos]. Raises ShapeError on another shape, other values, or a row without a token.

    `may_be_empty` allows such rows: a chunk of a longer sequence may hold nothing but padding.
    """
    if not isinstance(attention_mask, Tensor):
        raise ShapeError(f"attention_mask: expected a tensor [batch pos], got {type(attention_mask).__name__}.")
    if tuple(attention_mask.shape) != shape:
        raise ShapeError(f"attention_mask: expected [batch pos] {shape}, got {tuple(attention_mask.shape)}.")
    valid = attention_mask.bool()
    if attention_mask.device.type == "cpu":
        if not torch.equal(valid.to(attention_mask.dtype), attention_mask):
            raise ShapeError("attention_mask: expected 1 at tokens and 0 at padding, got other values.")
        if not may_be_empty and not bool(valid.any(dim=1).all()):
            raise ShapeError("attention_mask: expected a token in every row, got a row of padding only. Drop that row.")
    return valid


def attend_mask(valid: Tensor, n_query: int) -> Tensor:  # bool [batch key_pos] -> [batch 1 query_pos key_pos]
    """Causal and not padded. A padded query looks at itself, so that no row of scores is empty (which makes NaN)."""
    n_key = valid.shape[1]
    query = torch.arange(n_key - n_query, n_key, device=valid.device)[:, None]
    key = torch.arange(n_key, device=valid.device)[None, :]
    return ((key <= query) & valid[:, None, :] | (key == query))[:, None]
