"""Is it this expert? The controls that a claim about one expert needs, and a search that does not judge its own choice.

Protocol of arXiv 2606.03780: layer and expert are chosen on one half of the pairs and judged on the other, against
experts that ran at the same place, the one whose weight was most alike, and random directions of the same length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from workbench.errors import ShapeError
from workbench.experiments.expert_patching import (
    EVERY,
    Contributions,
    LayerContributions,
    expert_runs,
    patch_experts,
    run_deltas,
)
from workbench.experiments.metrics import Metric
from workbench.experiments.pairs import Pairs, Runs
from workbench.experiments.result import Result
from workbench.experiments.sweeps import staged, sweep
from workbench.models import Llama
from workbench.stats.resampling import sign_flip_max_t, t_interval

CONTROLS = ("random_expert", "gate_matched", "equal_norm")


@torch.no_grad()
def expert_controls(
    model: Llama,
    pairs: Pairs,
    metric: Metric,
    layer: int,
    expert: int,
    pos: str | int,
    *,
    direction: str = "denoise",
    n_draws: int = 199,
    n_directions: int = 39,
    judged: Sequence[str] | None = None,
    seed: int = 0,
    rows: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """The effect of patching one expert at one position, against three controls at the same place.

    random_expert: in each pair another expert that ran there in the clean version, drawn anew `n_draws` times.
    gate_matched: of those, the one whose weight was closest to the expert's. equal_norm: `n_directions` random
    directions as long as the expert's own patch. The effect is the share of the metric restored ("denoise") or
    destroyed ("noise").

    One row per control: `effect` and `control_effect` (means over pairs), `difference` (specificity) with its 95%
    interval `low`, `high` over pairs, by Student's t. `p_draws`: the share of draws whose mean reaches the effect, the
    expert's own counted as one, on these pairs (null for gate_matched, which is not drawn). Experts are drawn for it
    from all that ran, the expert itself among them: without an effect of its own it is one of them, and to leave it
    out would make p too small. `p_pairs`: two-sided sign flip of the difference over pairs, at least 2^(1 - n_pairs).
    judged: names of the pairs to use. out: a directory that a killed call continues from.
    """
    runs = expert_runs(model, pairs.only(pos), metric, direction)
    there, here = runs.columns(pairs.columns()[pos])
    table = Contributions(runs)[layer]
    generator = torch.Generator().manual_seed(seed)
    kept = [judged is None or name in judged for name in pairs.unit_names()]

    own = table.delta("both", (expert,), there, here)  # [pair d_model]
    others, weights, is_other = _others(table, runs, expert, there, here)
    lengths = own.norm(dim=-1, keepdim=True)
    random = [_unit(own.shape, generator).to(own) * lengths for _ in range(n_directions)]
    settings = {
        "experiment": "expert_controls", "layer": layer, "expert": expert, "pos": str(pos),
        "judged": None if judged is None else list(judged), "n_judged": sum(kept), "n_draws": n_draws,
        "n_directions": n_directions, "seed": seed, **runs.describe(),
    }  # fmt: skip

    def run(at: Callable[[str], Path | None]) -> Result:
        deltas = [own, *others, *random]
        swept = sweep(
            range(len(deltas)), lambda batch: _effects(runs, layer, {n: deltas[n] for n in batch}, here), settings,
            batch_size=runs.per_pass(rows), out=at("effects"), name="expert controls", progress=progress,
        ).frame  # fmt: skip
        effects = swept["effect"].to_torch().unflatten(0, (len(deltas), -1))
        effect, slot_effects, random_effects = effects[0], effects[1 : 1 + len(others)], effects[1 + len(others) :]
        drawn = {
            "random_expert": _draw(slot_effects, is_other, n_draws, generator),
            "gate_matched": _closest(slot_effects, weights, is_other, table, expert, there, here, direction)[None],
            "equal_norm": random_effects,
        }  # [draw pair] each
        null = {**drawn, "random_expert": _draw_with(slot_effects, is_other, effect, n_draws, generator)}
        found = [_judge(name, effect[kept], drawn[name][:, kept], null[name][:, kept], seed) for name in CONTROLS]
        return Result(pl.DataFrame(found), settings)

    return staged(run, settings, out)


def find_expert(
    model: Llama,
    pairs: Pairs,
    metric: Metric,
    pos: str | int,
    *,
    layers: Sequence[int] | None = None,
    min_active: float = 0.5,
    direction: str = "denoise",
    out: str | Path | None = None,
    progress: bool = True,
    **controls: Any,
) -> Result:
    """Choose a layer and an expert on half of the pairs, then judge the expert on the other half.

    The layer is where all experts together have the largest mean effect at `pos`; the expert is the one of largest mean
    effect among those that ran there in at least `min_active` of the discovery pairs' clean versions. The halves are
    fixed by the pairs' names. Returns the table of `expert_controls` on the validation half, what was chosen and from
    how many candidates in `settings`. out: a directory, of the search and of the controls, that a killed call continues
    from. Raises ShapeError with fewer than 4 pairs or without a candidate.
    """
    discovery, validation = split_pairs(pairs.unit_names())
    pairs = pairs.only(pos)
    search, judging = (None, None) if out is None else (Path(out) / "search", Path(out) / "controls")
    swept = patch_experts(
        model, pairs, metric, layers=layers, modes=("both",), direction=direction, out=search, progress=progress
    ).frame
    sign = 1 if direction == "denoise" else -1
    seen = swept.filter(pl.col("pair").is_in(discovery)).with_columns(effect=sign * pl.col("recovered"))
    by_layer = seen.filter(pl.col("coalition") == EVERY).group_by("layer").agg(pl.col("effect").mean())
    layer = by_layer.sort("effect", "layer", descending=[True, False])["layer"][0]
    candidates = (
        seen.filter(pl.col("expert").is_not_null() & (pl.col("layer") == layer))
        .group_by("expert")
        .agg(pl.col("effect").mean(), active=(pl.col("clean_weight") > 0).mean())
        .filter(pl.col("active") >= min_active)
        .sort("effect", "expert", descending=[True, False])
    )
    if candidates.is_empty():
        raise ShapeError(
            f"min_active: expected an expert that runs in {min_active:.0%} of the pairs, got none. Lower it."
        )
    expert = candidates["expert"][0]
    judged = expert_controls(
        model, pairs, metric, layer, expert, pos, direction=direction, judged=validation, out=judging,
        progress=progress, **controls,
    )  # fmt: skip
    chosen = {"discovery": discovery, "validation": validation, "n_candidates": len(candidates)}
    return Result(judged.frame, {**judged.settings, "experiment": "find_expert", **chosen})


def split_pairs(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Two halves of the names, fixed by the names alone, each in the given order."""
    if len(names) < 4:
        raise ShapeError(f"pairs: expected at least 4 to split into discovery and validation, got {len(names)}.")
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    first = set(ranked[: len(names) // 2])
    return [name for name in names if name in first], [name for name in names if name not in first]


def _effects(runs: Runs, layer: int, deltas: Mapping[int, Tensor], here: Tensor) -> pl.DataFrame:
    """One row per delta, by its number, and pair: `effect`, the share of the metric restored or destroyed."""
    values = run_deltas(runs, layer, torch.stack(list(deltas.values())), here.expand(len(deltas), -1))  # [delta pair]
    recovered = (values - runs.corrupt) / (runs.clean - runs.corrupt)
    effects = recovered if runs.direction == "denoise" else 1 - recovered
    numbers = [number for number in deltas for _ in range(effects.shape[1])]
    return pl.DataFrame({"delta": numbers, "effect": effects.flatten().numpy()})


def _others(
    table: LayerContributions, runs: Runs, expert: int, there: Tensor, here: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """By slot of the clean run: the patch of the expert in it [pair d_model], its weight and whether it is another."""
    clean = table.source.at(there) if runs.direction == "denoise" else table.target.at(here)
    deltas = [table.delta("both", ids, there, here) for ids in clean.ids.unbind(-1)]
    return deltas, clean.weights.cpu(), (clean.ids != expert).cpu()  # [pair k] each


def _draw(effects: Tensor, is_other: Tensor, n_draws: int, generator: torch.Generator) -> Tensor:
    """[draw pair]: the effect of one other expert, drawn in each pair on its own."""
    if not bool(is_other.any(1).all()):
        raise ShapeError("random_expert: expected other experts to compare with, got a model with one per token.")
    chosen = torch.multinomial(is_other.float(), n_draws, replacement=True, generator=generator)  # [pair draw]
    return effects.T.gather(-1, chosen).T


def _draw_with(effects: Tensor, is_other: Tensor, own: Tensor, n_draws: int, generator: torch.Generator) -> Tensor:
    """[draw pair]: as `_draw`, from all experts that ran and the one in question, whether it ran or not."""
    effects = torch.where(is_other, effects.T, torch.nan)  # [pair k], its own slot left to the last column
    pool = torch.cat([effects, own[:, None]], dim=1)
    chosen = torch.multinomial((~pool.isnan()).float(), n_draws, replacement=True, generator=generator)  # [pair draw]
    return pool.gather(-1, chosen).T


def _closest(
    effects: Tensor, weights: Tensor, is_other: Tensor, table: LayerContributions, expert: int, there: Tensor,
    here: Tensor, direction: str,
) -> Tensor:  # [pair]  # fmt: skip
    own = table.clean_and_corrupt_weight((expert,), there, here, direction)[0].cpu()
    gap = (weights - own[:, None]).abs().masked_fill(~is_other, torch.inf)
    return effects.T.gather(-1, gap.argmin(-1, keepdim=True))[:, 0]


def _unit(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    direction = torch.randn(*shape, generator=generator)
    return direction / direction.norm(dim=-1, keepdim=True)


def _judge(control: str, effect: Tensor, draws: Tensor, null: Tensor, seed: int) -> dict[str, Any]:
    """`effect` [pair] against `draws` [draw pair], and its p among those of `null` [draw pair]."""
    own, other = effect.double().numpy(), draws.double().numpy()
    difference = own - other.mean(0)  # [pair]
    low, high = t_interval(difference)
    p_draws = p_among(own, null.double().numpy()) if len(other) > 1 else None
    p_pairs = float(sign_flip_max_t(difference[:, None], seed=seed)[1][0])
    return {
        "control": control, "effect": own.mean(), "control_effect": other.mean(), "difference": difference.mean(),
        "low": float(low), "high": float(high), "p_draws": p_draws, "p_pairs": p_pairs,
        "n_draws": len(other), "n_pairs": len(own),
    }  # fmt: skip


def p_among(own: np.ndarray, draws: np.ndarray) -> float:  # [pair], [draw pair]
    """The share of means that reach `own`'s, its own counted as one, so that it is never 0."""
    means = np.ascontiguousarray(np.vstack([own, draws])).mean(1)  # one way of summing, so that equals stay equal
    return float(np.count_nonzero(means >= means[0]) / len(means))
