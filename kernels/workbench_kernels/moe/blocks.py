"""Block sizes by path: what the tuned tables say, or sizes that fit every device.

A set of blocks is a plain dict, as it stands in a table: {"bm", "router", "gate_up", "down", "combine"}. `bm` is the
number of slots in a tile (absent for decode); bn weight rows, bk columns, warps, stages, group (tiles that run through
their columns together) and tma (weights by tensor descriptor, sm_90 on) belong to one kernel. In the router, bt tokens
and bk columns make one tile of logits, summed over `splits` parts; `tokens` is how many one program chooses for.
"""

from __future__ import annotations

from typing import Any

import torch

from workbench_kernels.moe.plan import PATHS
from workbench_kernels.quant import QuantizedExperts
from workbench_kernels.tables import Blocks, lookup

DECODE_TOKENS, SKINNY_SLOTS = 4, 16  # up to 4 tokens; up to 16 slots per expert on average

_ROUTER = {"tokens": 4, "bt": 16, "bk": 64, "splits": 20, "warps": 4, "stages": 3}
SAFE: dict[str, Blocks] = {
    "decode": {
        "router": _ROUTER,
        "gate_up": {"bn": 16, "bk": 256, "warps": 4, "stages": 2},
        "down": {"bn": 8, "bk": 1024, "warps": 4, "stages": 2},
        "combine": {"bd": 512, "warps": 4},
    },
    "skinny": {
        "bm": 16,
        "router": _ROUTER | {"splits": 5, "stages": 2},
        "gate_up": {"bn": 64, "bk": 64, "warps": 4, "stages": 2, "group": 1, "tma": False},
        "down": {"bn": 64, "bk": 64, "warps": 4, "stages": 2, "group": 1, "tma": False},
        "combine": {"bd": 512, "warps": 4},
    },
    "tile": {
        "bm": 64,
        "router": _ROUTER | {"bt": 32, "splits": 1},
        "gate_up": {"bn": 64, "bk": 32, "warps": 8, "stages": 2, "group": 8, "tma": False},
        "down": {"bn": 32, "bk": 32, "warps": 4, "stages": 2, "group": 8, "tma": False},
        "combine": {"bd": 512, "warps": 4},
    },
}


def choose_path(path: str, n_tokens: int, n_experts: int, k: int) -> str:
    """The path that runs: the one that is pinned, or by the number of tokens alone."""
    if path in PATHS:
        return path
    if n_tokens <= DECODE_TOKENS:
        return "decode"
    return "skinny" if n_tokens * k <= SKINNY_SLOTS * n_experts else "tile"


def safe_blocks(path: str, dtype: torch.dtype) -> Blocks:
    """Sizes that compile without spills and fit the shared memory of every supported device; smaller for float32."""
    blocks = SAFE[path]
    if dtype != torch.float32:
        return blocks
    narrow = {
        name: part | {"bk": max(32, part["bk"] // 2)} for name, part in blocks.items() if name in ("gate_up", "down")
    }
    if path == "tile":
        narrow = narrow | {"bm": 32, "gate_up": narrow["gate_up"] | {"bn": 32, "warps": 4}}
    return blocks | narrow


def arithmetic(path: str, blocks: Blocks) -> Blocks:
    """The sizes that decide in which order a sum runs, and so its bits.

    They are the same in every bucket of a path: a token gets the same bits in a batch of any size. A product of tiles
    adds column after column whatever the tile, in steps of bk; a matrix-vector product also adds across threads.
    """
    if path == "decode":
        return {part: blocks[part] for part in ("router", "gate_up", "down")}
    return {"router": blocks["router"], **{part: {"bk": blocks[part]["bk"]} for part in ("gate_up", "down")}}


def blocks_for(path: str, x: torch.Tensor, gate_up: Any, down: Any, k: int) -> Blocks:
    """The blocks for one call: the table's, or safe ones where it has none, which `lookup` says."""
    n_experts, d_model, d_expert = down.shape
    shape = {"d_model": d_model, "d_expert": d_expert, "n_experts": n_experts, "k": k}
    bits = gate_up.bits if isinstance(gate_up, QuantizedExperts) else 16
    return lookup(path, x.shape[0], shape, x.dtype, bits, x.device) or safe_blocks(path, x.dtype)
