"""What a text loses without an expert: the two meanings of a knock-out, and the mean in its place, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl
import torch
from torch import Tensor

from workbench.capture import routed_layers
from workbench.config import Qwen3MoeConfig
from workbench.errors import ShapeError
from workbench.experiments.identity import check_choices, describe_model, digest, mask_digest
from workbench.experiments.result import Result
from workbench.experiments.sweeps import sweep
from workbench.hooks import HookPoint
from workbench.interventions import Intervention, KnockOut, SetExpertOutput, Where
from workbench.interventions.where import told
from workbench.models import Llama
from workbench.models.layers import check_tokens

MODES = ("reroute", "drop", "drop_renormalise", "mean")


class Ablation(NamedTuple):
    """One expert of one layer, taken out in one way."""

    mode: str
    layer: int
    expert: int


@torch.no_grad()
def ablate_experts(
    model: Llama,
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers: Sequence[int] | None = None,
    experts: Sequence[int] | None = None,
    modes: Sequence[str] = ("reroute", "drop"),
    names: Sequence[str] | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """Take out one expert at a time and measure every document's loss.

    tokens: documents [batch pos]. modes: those of `KnockOut`, and "mean", which puts the expert's mean output over
    these documents in place of its output. Frame: `mode`, `layer`, `expert`, `doc`, `nll` (nats per token, mean over a
    document's next-token predictions), `delta` (more than without ablation) and `selected` (share of the document's
    tokens that choose the expert). Documents are the unit: `result.mean("delta", by=[...], unit="doc")`.
    """
    usable = routed_layers(model)
    assert isinstance(model.cfg, Qwen3MoeConfig)
    check_tokens(tokens, model.cfg)
    chosen = list(usable if layers is None else layers)
    tried = list(range(model.cfg.n_experts) if experts is None else experts)
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or any(layer not in usable for layer in chosen):
        raise ShapeError(
            f"modes, layers: expected some of {', '.join(MODES)} and layers {', '.join(map(str, usable))}, "
            f"got {', '.join(unknown) or ', '.join(map(str, chosen))}."
        )
    _check_experts(model.cfg, tried)
    check_choices(modes=modes, layers=layers, experts=experts)
    docs = list(names) if names is not None else [str(row) for row in range(len(tokens))]
    if len(docs) != len(tokens):
        raise ShapeError(f"names: expected one for each of {len(tokens)} documents, got {len(docs)}.")
    leaves = ("hook_resid_pre", "mlp.hook_expert_ids")
    _, cache = model.run_with_cache(
        tokens, attention_mask=attention_mask, names_filter=[f"blocks.{n}.{leaf}" for n in chosen for leaf in leaves]
    )
    base = _losses(model(tokens, attention_mask), tokens, attention_mask)  # [batch]
    means = mean_expert_outputs(model, tokens, attention_mask, chosen) if "mean" in modes else {}
    valid = torch.ones_like(tokens).bool() if attention_mask is None else attention_mask.bool()

    def measure(cells: Sequence[Ablation]) -> pl.DataFrame:
        frames = []
        for cell in cells:
            change = _change(cell, means)
            with told(model, tokens, attention_mask):
                logits = model(
                    cache["resid_pre", cell.layer], attention_mask, start_at_layer=cell.layer, interventions=[change]
                )
            held = (cache["expert_ids", cell.layer] == cell.expert).any(-1).cpu() & valid.cpu()  # [batch pos]
            nll = _losses(logits, tokens, attention_mask)
            columns = {"doc": docs, "nll": nll.numpy(), "delta": (nll - base).numpy(),
                       "selected": (held.sum(1) / valid.cpu().sum(1)).numpy()}  # fmt: skip
            frames.append(pl.DataFrame(cell._asdict() | columns))
        return pl.concat(frames)

    settings = {
        "experiment": "ablation", "modes": list(modes), "layers": chosen, "experts": tried,
        **describe_model(model), "names": docs, "tokens": digest(tokens.long()), "mask": mask_digest(attention_mask),
        "nll": base.tolist(),
    }  # fmt: skip
    cells = [Ablation(mode, layer, expert) for mode in modes for layer in chosen for expert in tried]
    return sweep(cells, measure, settings, batch_size=16, out=out, name="ablation", progress=progress)


def _check_experts(cfg: Qwen3MoeConfig, experts: Sequence[int]) -> None:
    for expert in experts:
        if not 0 <= expert < cfg.n_experts:
            raise ShapeError(f"experts: expected 0 to {cfg.n_experts - 1}, got {expert}.")


@torch.no_grad()
def mean_expert_outputs(
    model: Llama, tokens: Tensor, attention_mask: Tensor | None = None, layers: Sequence[int] | None = None
) -> dict[int, Tensor]:
    """By layer [expert d_model]: each expert's output before weighting, averaged over the tokens that chose it.

    Zero for an expert that no token chose. For `SetExpertOutput`, which makes it a mean-ablation.
    """
    usable = routed_layers(model)
    found: dict[int, Tensor] = {}
    ids: dict[int, Tensor] = {}
    valid = torch.ones_like(tokens).bool() if attention_mask is None else attention_mask.bool()
    n_experts = getattr(model.cfg, "n_experts", 0)

    def keep_ids(x: Tensor, hook: HookPoint) -> None:
        ids[hook.layer()] = x

    def average(x: Tensor, hook: HookPoint) -> None:  # [batch pos k d_model]
        slots = ids[hook.layer()][valid.to(x.device)].flatten()  # [slot]
        sums = torch.zeros(n_experts, x.shape[-1], dtype=torch.float32, device=x.device)
        sums.index_add_(0, slots, x[valid.to(x.device)].flatten(0, 1).float())
        counts = torch.bincount(slots, minlength=n_experts).clamp(min=1)
        found[hook.layer()] = (sums / counts[:, None]).cpu()

    chosen = usable if layers is None else layers
    hooks = [(f"blocks.{layer}.mlp.hook_expert_ids", keep_ids) for layer in chosen]
    hooks += [(f"blocks.{layer}.mlp.hook_expert_out", average) for layer in chosen]
    model.run_with_hooks(tokens, attention_mask=attention_mask, fwd_hooks=hooks, stop_at_layer=max(chosen) + 1)
    return found


def _change(cell: Ablation, means: dict[int, Tensor]) -> Intervention:
    where = Where(layers=(cell.layer,))
    if cell.mode == "mean":
        return SetExpertOutput(experts=(cell.expert,), value=means[cell.layer][cell.expert], where=where)
    return KnockOut(experts=(cell.expert,), mode=cell.mode, where=where)


def _losses(logits: Tensor, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:  # [batch]
    """Mean loss of each row in nats per predicted token, padding left out."""
    targets = tokens[:, 1:].to(logits.device)
    losses = -logits[:, :-1].float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]  # [batch pos-1]
    counted = torch.ones_like(targets) if attention_mask is None else (attention_mask[:, 1:] * attention_mask[:, :-1])
    counted = counted.to(losses.device)
    return ((losses * counted).sum(1) / counted.sum(1).clamp(min=1)).cpu()
