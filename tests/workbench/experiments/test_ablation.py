from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch
import torch.nn.functional as F
from closeness import near
from torch import Tensor

from workbench.errors import ConfigError, ShapeError
from workbench.experiments.ablation import ablate_experts, mean_expert_outputs
from workbench.interventions import KnockOut, SetExpertOutput, Where
from workbench.models import Llama, Qwen3Moe
from workbench.planted.mechanisms import A, writing_mlp


def answered() -> tuple[Qwen3Moe, Tensor, tuple[int, ...]]:
    """Planted prompts followed by their right answer."""
    m = writing_mlp()
    tokens = torch.cat([m.clean, torch.full((8, 1), A)], dim=1)
    assert isinstance(m.model, Qwen3Moe)
    return m.model, tokens, m.experts


def test_only_the_planted_expert_is_missed() -> None:
    model, tokens, experts = answered()
    result = ablate_experts(model, tokens, modes=["reroute", "drop", "drop_renormalise"], progress=False)
    means = result.mean("delta", by=["mode", "layer", "expert"], unit="doc")
    assert len(means) == 3 * 4 * 8
    top = means.sort("mean", descending=True).head(3)
    assert set(top["layer"]) == {2}
    assert set(top["expert"]) == set(experts)
    assert top["mean"].min() > 5 * means.sort("mean", descending=True)["mean"][3]


@torch.no_grad()
def test_losses_equal_those_of_the_whole_model(moe: Qwen3Moe, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    frame = ablate_experts(
        moe, tokens, mask, layers=[2], experts=[1, 4], modes=["reroute", "drop", "mean"], progress=False
    ).frame
    means = mean_expert_outputs(moe, tokens, mask)

    def loss(items: list) -> list[float]:
        logits = moe(tokens, mask, interventions=items)
        rows = [(logits[0], tokens[0]), (logits[1, 3:], tokens[1, 3:])]
        return [float(F.cross_entropy(row[:-1], ids[1:])) for row, ids in rows]

    where, base = Where(layers=(2,)), loss([])
    for expert in (1, 4):
        for mode in ("reroute", "drop", "mean"):
            change = (
                SetExpertOutput(experts=(expert,), value=means[2][expert], where=where)
                if mode == "mean"
                else KnockOut(experts=(expert,), mode=mode, where=where)
            )
            rows = frame.filter((pl.col("expert") == expert) & (pl.col("mode") == mode))
            expected = loss([change])
            assert rows["nll"].to_list() == near(expected, *base)
            assert rows["delta"].to_list() == near([a - b for a, b in zip(expected, base, strict=True)], *base)
    unused = frame.filter((pl.col("selected") == 0) & (pl.col("mode") != "reroute"))
    assert unused["delta"].abs().max() in (None, near(0, *base))


@torch.no_grad()
def test_mean_outputs_by_hand(moe: Qwen3Moe, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    names = ["blocks.0.mlp.hook_expert_ids", "blocks.0.mlp.hook_expert_out"]
    _, cache = moe.run_with_cache(tokens, attention_mask=mask, names_filter=names)
    held = (cache[names[0]] == 3) & mask.bool()[..., None]
    means = mean_expert_outputs(moe, tokens, mask)
    assert set(means) == {0, 2}
    assert torch.allclose(means[0][3], cache[names[1]][held].mean(0), atol=1e-6)


def test_a_sweep_is_kept_and_bad_requests_are_named(
    moe: Qwen3Moe, llama: Llama, tokens: Tensor, tmp_path: Path
) -> None:
    one = ablate_experts(moe, tokens, layers=[0], out=tmp_path, progress=False)
    assert ablate_experts(moe, tokens, layers=[0], out=tmp_path, progress=False).frame.equals(one.frame)
    with pytest.raises(ConfigError, match="expected a mixture of experts"):
        ablate_experts(llama, tokens)
    with pytest.raises(ShapeError, match=r"expected some of reroute.*got mask"):
        ablate_experts(moe, tokens, modes=["mask"])
    with pytest.raises(ShapeError, match="layers 0, 2, got 1"):
        ablate_experts(moe, tokens, layers=[1])
