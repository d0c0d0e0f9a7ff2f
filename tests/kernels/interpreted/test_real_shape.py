"""One layer of the real model's shape: 128 experts, top-8, d_model 2560, d_expert 960, bfloat16."""

from __future__ import annotations

import pytest
import torch
from moe_problems import BLOCKS, Problem, check

from workbench_kernels import Intervene

GEMM = BLOCKS["gate_up"] | {"bn": 1024, "bk": 512}
LARGE = BLOCKS | {"gate_up": GEMM, "down": GEMM | {"bn": 2048}, "combine": {"bd": 4096, "warps": 4}}


D, F, E, K = 2560, 960, 128, 8


def layer(n_tokens: int) -> Problem:
    """One random expert, rolled by another number of rows for each: a hundred million random numbers take long."""
    g = torch.Generator().manual_seed(0)
    x, router = torch.randn(n_tokens, D, generator=g).bfloat16(), torch.randn(E, D, generator=g).bfloat16() / D**0.5
    gate_up, down = torch.empty(E, 2 * F, D, dtype=torch.bfloat16), torch.empty(E, D, F, dtype=torch.bfloat16)
    for stack, width in ((gate_up, D), (down, F)):
        one = (torch.randn(stack.shape[1:], generator=g) / width**0.5).bfloat16()
        for expert in range(E):
            stack[expert] = one.roll(7 * expert, 0)
    return Problem(x, router, gate_up, down, K)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "tokens"), [("decode", 1), ("skinny", 3), ("tile", 24)])
def test_the_layer_of_the_32b_model(path: str, tokens: int) -> None:
    """On the tile path tokens share the first and last 8 experts, for the interpreter's sake: tiles are full."""
    ids = torch.stack([torch.arange(K) + (E - K) * (token % 2) for token in range(tokens)])
    change = Intervene(forced_ids=ids) if path == "tile" else None
    _, routing = check(layer(tokens), path, ("expert_out", "margin"), change, blocks=LARGE)
    assert int((routing.expert_load > 0).sum()) >= 8
