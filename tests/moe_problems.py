"""Random expert layers, and the comparison of the Triton path with the float64 oracle that all tests share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from workbench_kernels import Intervene, Need, QuantizedExperts, Routing, fused_moe, quantize
from workbench_kernels.moe.plan import ROUTED
from workbench_kernels.moe.reference import reference_moe

Weight = Tensor | QuantizedExperts
_GEMM = {"bn": 64, "bk": 64, "warps": 4, "stages": 2, "group": 3, "tma": False}
# Large blocks, because the interpreter's time goes by operations and not by elements.
BLOCKS: dict[str, Any] = {
    "bm": 16,
    "router": {"tokens": 128, "bt": 64, "bk": 64, "splits": 2, "warps": 4, "stages": 2},
    "gate_up": _GEMM,
    "down": _GEMM,
    "combine": {"bd": 128, "warps": 4},
}


@dataclass(frozen=True)
class Problem:
    """The arguments of one layer."""

    x: Tensor  # [T, D]
    router: Tensor  # [E, D]
    gate_up: Weight  # [E, 2F, D]
    down: Weight  # [E, D, F]
    k: int

    @property
    def args(self) -> tuple[Any, ...]:
        return self.x, self.router, self.gate_up, self.down, self.k

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.x.shape[0], self.router.shape[0], self.k, self.x.shape[1]  # T, E, K, D


def problem(
    t: int, d: int, f: int, e: int, k: int, dtype: torch.dtype = torch.float32, bits: int = 16, seed: int = 0
) -> Problem:
    g = torch.Generator().manual_seed(seed)
    x, router = torch.randn(t, d, generator=g), torch.randn(e, d, generator=g) / d**0.5
    gate_up = (torch.randn(e, 2 * f, d, generator=g) / d**0.5).to(dtype)
    down = (torch.randn(e, d, f, generator=g) / f**0.5).to(dtype)
    weights: tuple[Weight, Weight] = (gate_up, down)
    if bits < 16:
        weights = quantize(gate_up, bits), quantize(down, bits)
    return Problem(x.to(dtype), router.to(dtype), *weights, k)


def relative(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; the absolute norm where that is 0."""
    scale = float(expected.double().norm())
    return float((got.double() - expected.double()).norm()) / (scale or 1.0)


def tolerance(p: Problem, numerics: str = "trained") -> float:
    if p.x.dtype == torch.float32:
        return 1e-5
    quantized = isinstance(p.gate_up, QuantizedExperts) and p.gate_up.bits == 4  # rounded once more, to x's dtype
    return {"trained": 8e-3 if quantized else 6e-3, "hf": 1.5e-2}[numerics]


def check(
    p: Problem,
    path: str,
    need: Need | tuple[str, ...] = (),
    change: Intervene | None = None,
    numerics: str = "trained",
    norm_topk_prob: bool = True,
    blocks: dict[str, Any] | None = None,
) -> tuple[Tensor, Routing]:
    """Run the Triton path and hold everything it gives against the oracle, expert choice apart from values."""
    change = change or Intervene()
    options = {"norm_topk_prob": norm_topk_prob, "need": need}
    y, got = fused_moe(
        *p.args, **options, intervene=change, impl="triton", path=path, numerics=numerics, _blocks=blocks or BLOCKS
    )
    _, own = reference_moe(*p.args, **options, intervene=change)
    assert (got.impl, got.path) == ("triton", path)
    assert_same_choice(got.expert_ids, own.expert_ids, p, change, slack=1e-5 if numerics == "trained" else 0.05)
    expected_y, expected = reference_moe(*p.args, **options, intervene=replace(change, forced_ids=got.expert_ids))
    limit = tolerance(p, numerics)
    assert y.dtype == p.x.dtype
    assert relative(y, expected_y) < limit
    wide = 1e-5 if numerics == "trained" else limit
    assert relative(got.router_logits, expected.router_logits) < wide
    assert relative(got.routing_weights, expected.routing_weights) < wide
    assert torch.allclose(got.expert_load.double(), expected.expert_load, atol=1e-6)
    names = Need.of(need).names
    for name in (*ROUTED, "router_probs"):
        assert (getattr(got, name) is not None) == (name in names), name
        if name in names:
            assert relative(getattr(got, name), getattr(expected, name)) < (
                wide if name == "router_probs" else limit
            ), name
    if "margin" in names:
        assert torch.allclose(
            got.margin.double(), own.margin, atol=1e-4 if numerics == "trained" else 0.1, equal_nan=True
        )
    return y, got


def assert_same_choice(got: Tensor, expected: Tensor, p: Problem, change: Intervene, slack: float) -> None:
    """The same ids, except where the oracle's logits are closer than what float32 tells apart."""
    if torch.equal(got, expected):
        return
    assert change.forced_ids is None
    logits = p.x.double() @ p.router.double().T
    if change.router_bias is not None:
        logits = logits + change.router_bias.double()
    if change.keep_mask is not None:
        logits = logits.masked_fill(~change.keep_mask, -torch.inf)
        assert change.keep_mask.expand_as(logits).gather(1, got).all()
    assert (got.sort(-1).values.diff(dim=-1) > 0).all(), "an expert twice in one token"
    assert (logits.gather(1, got) - logits.gather(1, expected)).abs().max() < slack
