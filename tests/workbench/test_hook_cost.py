"""What hook points cost while nobody listens: the time of all their idle calls beside the time of a forward pass."""

from __future__ import annotations

import timeit

import pytest
import torch

from workbench.config import Qwen3MoeConfig, RopeConfig
from workbench.hooks import HookPoint
from workbench.models import build_model, init_weights

CFG = Qwen3MoeConfig(
    d_model=128, n_layers=6, n_heads=4, n_kv_heads=2, d_head=32, d_mlp=192, d_vocab=3072, n_ctx=512, norm_eps=1e-6,
    rope=RopeConfig(theta=500_000.0), n_experts=32, k=4, d_expert=48, sparse_layers=(True,) * 6,
)  # fmt: skip


@pytest.mark.slow
def test_idle_hook_points_cost_next_to_nothing() -> None:
    """One token through a model of the bundled size is the hardest case: any other forward pass takes longer.

    Both times are minima of repeats, which other work on the machine cannot shorten; one thread.
    """
    model = init_weights(build_model(CFG), seed=0)
    token, x, point = torch.tensor([[7]]), torch.ones(1), HookPoint("batch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        forward = min(timeit.repeat(lambda: model(token), number=10, repeat=15)) / 10
    torch.set_num_threads(threads)
    idle_call = min(timeit.repeat(lambda: point(x), number=20_000, repeat=15)) / 20_000
    bare_call = min(timeit.repeat(lambda: x, number=20_000, repeat=15)) / 20_000
    share = len(model.hook_dict) * (idle_call - bare_call) / forward
    print(
        f"{len(model.hook_dict)} idle hook points: {share:.1%} of a forward pass of one token ({forward * 1e3:.1f} ms)"
    )
    assert share < 0.03
