"""One layer of the real model's shape: 128 experts, top-8, d_model 2560, d_expert 960, bfloat16."""

from __future__ import annotations

import pytest
import torch
from moe_problems import BLOCKS, check, problem

GEMM = BLOCKS["gate_up"] | {"bn": 1024, "bk": 512}
LARGE = BLOCKS | {"gate_up": GEMM, "down": GEMM | {"bn": 2048}, "combine": {"bd": 4096, "warps": 4}}


@pytest.mark.slow
@pytest.mark.parametrize(("path", "tokens"), [("decode", 1), ("skinny", 16), ("tile", 16)])
def test_the_layer_of_the_32b_model(path: str, tokens: int) -> None:
    p = problem(tokens, 2560, 960, 128, 8, torch.bfloat16)
    _, routing = check(p, path, ("expert_out", "margin"), blocks=LARGE)
    assert int((routing.expert_load > 0).sum()) >= 8
