"""What each part of the model says in tokens: logit lens, expert logit lens, and direct logit attribution.

A logit is linear in the final residual stream once the final norm's scale is frozen, and the stream is a sum: the
embedding, every head, every MLP, every expert, every neuron. Direct logit attribution divides a logit among them, and
the parts sum to it. It shows direct effects only: what a part changes in later parts is not in it; patching shows that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl
import torch
from torch import Tensor

from workbench.activations import ActivationCache
from workbench.errors import ConfigError, InterventionError, ShapeError
from workbench.experiments.identity import describe_model
from workbench.experiments.metrics import Ids, column
from workbench.experiments.result import Result
from workbench.models import Llama
from workbench.models.layers import inverse_rms, wide
from workbench.models.moe import Moe

PARTS = ("component", "head", "expert", "neuron")


@torch.no_grad()
def logit_lens(
    model: Llama, tokens: Tensor, targets: Ids, attention_mask: Tensor | None = None, pos: int | None = -1
) -> Result:
    """The residual stream after every layer, read through the final norm and unembedding (nostalgebraist 2020).

    One row per (pair, layer, pos): `logit`, `log_probability` in nats and `rank` (0 is the most probable) of the row's
    target, and the most probable `top_id`. `pair` is the row of tokens [batch pos]; `layer` -1 is the embedding and the
    last layer's row is the model's own prediction. Nothing is trained ("tuned-free"). `pos` None reads every position.
    """
    wanted = _known(model, targets, tokens)  # [batch]
    places = _places(tokens, pos)
    names = ["hook_embed", *(f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers))]
    _, cache = model.run_with_cache(
        tokens, attention_mask=attention_mask, names_filter=names, stop_at_layer=model.cfg.n_layers
    )
    frames = []
    for layer, name in enumerate(names, start=-1):
        logits = wide(model.unembed(model.ln_final(cache[name][:, places])))  # [batch pos d_vocab]
        target = logits.gather(-1, wanted[:, None, None].to(logits.device).expand(-1, len(places), 1))  # [batch pos 1]
        values = {
            "logit": target[..., 0],
            "log_probability": target[..., 0] - logits.logsumexp(-1),
            "rank": (logits > target).sum(-1),
            "top_id": logits.argmax(-1),
        }
        frames.append(_grid(values, places).with_columns(layer=pl.lit(layer, pl.Int64)))
    columns = ("pair", "layer", "pos", "logit", "log_probability", "rank", "top_id")
    frame = _without_padding(pl.concat(frames).select(columns).sort("pair", "layer", "pos"), attention_mask)
    return Result(
        _named(frame),
        {"experiment": "logit_lens", **describe_model(model), "targets": wanted.tolist(), "pos": pos},
    )


@torch.no_grad()
def direct_logit_attribution(
    model: Llama,
    tokens: Tensor,
    correct: Ids,
    wrong: Ids | None = None,
    *,
    attention_mask: Tensor | None = None,
    pos: int = -1,
    parts: str = "expert",
) -> Result:
    """What each part adds to a logit, or to the difference of two, at one position; the parts of a pair sum to it.

    One row per part of each pair, with columns pair, component, layer, head, expert, neuron (null where they do not
    apply) and `value` in logits. `parts` says how far the stream is taken apart:
      component  embedding, attention and MLP of each layer
      head       attention by head
      expert     by head, and each MLP by the experts that ran, dense ones whole (the default)
      neuron     by head, and each MLP by neuron, those of experts included (weighted as the router weighted them)
    The scale of the final norm is frozen at its value in this run, at this position; an earlier scale would give
    something else, no attribution. Under interventions a layer with some has one more row, "intervention": what they
    put into the stream beside its parts. Raises ConfigError for another name in `parts`, InterventionError under
    interventions on the final norm.
    """
    if parts not in PARTS:
        raise ConfigError(f"parts: expected one of {', '.join(PARTS)}, got {parts!r}.")
    pos = column(pos, tokens.shape[1])
    ids = [None if chosen is None else _known(model, chosen, tokens).tolist() for chosen in (correct, wrong)]
    edited = _edited_layers(model)
    names = [f"blocks.{n}.hook_resid_post" for layer in edited for n in (layer - 1, layer) if n >= 0]
    names += _needed(model, parts)
    logits, cache = model.run_with_cache(tokens, attention_mask=attention_mask, names_filter=names)
    here = ActivationCache({name: activation[:, pos] for name, activation in cache.items()})  # [batch ...] each
    direction = logit_direction(model, tokens, correct, wrong)  # [batch d_model]
    direction = direction * inverse_rms(here["resid_post", model.cfg.n_layers - 1], model.cfg.norm_eps)
    frames = [_rows("embed", None, {}, wide(here["hook_embed"] * direction).sum(-1)[:, None])]
    for layer in range(model.cfg.n_layers):
        written = [part for of in (_attention_parts, _mlp_parts) for part in of(model, here, layer, direction, parts)]
        frames += written + ([_beside(here, layer, direction, written)] if layer in edited else [])
    settings = {
        "experiment": "direct_logit_attribution", **describe_model(model),
        "correct": ids[0], "wrong": ids[1],
        "pos": pos, "parts": parts, "total": _difference(logits[:, pos], tokens, correct, wrong).tolist(),
    }  # fmt: skip
    return Result(_named(pl.concat(frames).sort("pair", maintain_order=True)), settings)


@torch.no_grad()
def expert_logit_lens(
    model: Llama, tokens: Tensor, *, attention_mask: Tensor | None = None, pos: int | None = -1, top: int = 5
) -> Result:
    """The tokens that each expert that ran speaks for and against, by what it adds to the logits at its own position.

    One row per (pair, layer, pos, expert): its routing weight, `top_ids` and `top_values` (the `top` tokens whose logit
    it raises most), `bottom_ids` and `bottom_values`. Values are additions to logits with the final scale frozen, less
    their mean over the vocabulary, which no probability depends on. Dense layers have no rows. Raises ConfigError for a
    model without experts.
    """
    layers = [layer for layer in range(model.cfg.n_layers) if isinstance(model.blocks[layer].mlp, Moe)]
    if not layers:
        raise ConfigError("model: expected one with experts, got dense layers only. Use direct_logit_attribution.")
    leaves = ("hook_expert_out", "hook_expert_ids", "hook_routing_weights")
    names = [f"blocks.{layer}.mlp.{leaf}" for layer in layers for leaf in leaves]
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    _, cache = model.run_with_cache(
        tokens, attention_mask=attention_mask, names_filter=[*names, last], stop_at_layer=model.cfg.n_layers
    )
    places = _places(tokens, pos)
    inverse = inverse_rms(cache[last][:, places], model.cfg.norm_eps)[..., None, :]  # [batch pos 1 1]
    frames = []
    for layer in layers:
        out = cache["expert_out", layer][:, places] * cache["routing_weights", layer][:, places, :, None]
        spoken = wide(model.unembed((wide(out) * inverse * model.ln_final.weight).to(model.dtype)))  # [b p k d_vocab]
        spoken = spoken - spoken.mean(-1, keepdim=True)
        values: dict[str, Tensor] = {
            "expert": cache["expert_ids", layer][:, places],
            "weight": cache["routing_weights", layer][:, places],
        }
        for name, side in (("top", spoken.topk(top)), ("bottom", spoken.topk(top, largest=False))):
            values |= {f"{name}_ids": side.indices, f"{name}_values": side.values}
        frames.append(_grid(values, places, slots=True).with_columns(layer=pl.lit(layer, pl.Int64)))
    order = ["pair", "layer", "pos", "expert", "weight", "top_ids", "top_values", "bottom_ids", "bottom_values"]
    frame = pl.concat(frames).select(order).sort("pair", "layer", "pos", maintain_order=True)
    settings = {"experiment": "expert_logit_lens", **describe_model(model), "pos": pos, "top": top}
    return Result(_named(_without_padding(frame, attention_mask)), settings)


def per_row(ids: Ids, tokens: Tensor) -> Tensor:  # [batch]
    """One token id for each row. Raises ShapeError when there is neither one nor one per row."""
    chosen = torch.as_tensor(ids, dtype=torch.long)
    if chosen.ndim > 1 or (chosen.ndim == 1 and len(chosen) != len(tokens)):
        raise ShapeError(f"token ids: expected one, or one per row [{len(tokens)}], got {tuple(chosen.shape)}.")
    return chosen.expand(len(tokens))


def _known(model: Llama, ids: Ids, tokens: Tensor) -> Tensor:  # [batch]
    """`per_row`, checked against the vocabulary."""
    chosen = per_row(ids, tokens)
    if not 0 <= int(chosen.min()) <= int(chosen.max()) < model.cfg.d_vocab:
        raise ShapeError(f"token ids: expected 0 to {model.cfg.d_vocab - 1}, got {chosen.tolist()}.")
    return chosen


def logit_direction(model: Llama, tokens: Tensor, correct: Ids, wrong: Ids | None = None) -> Tensor:
    """What the final stream, divided by its scale, is multiplied with to give a logit (difference): [batch d_model]."""
    rows = wide(model.unembed.weight[per_row(correct, tokens).to(model.device)])
    if wrong is not None:
        rows = rows - wide(model.unembed.weight[per_row(wrong, tokens).to(model.device)])
    return rows * wide(model.ln_final.weight)


def _difference(
    logits: Tensor, tokens: Tensor, correct: Ids, wrong: Ids | None
) -> Tensor:  # [batch d_vocab] -> [batch]
    picked = [
        wide(logits.gather(-1, per_row(ids, tokens).to(logits.device)[:, None]))[:, 0]
        for ids in (correct, wrong)
        if ids is not None
    ]
    return picked[0] - picked[1] if len(picked) == 2 else picked[0]


def _needed(model: Llama, parts: str) -> list[str]:
    """The hook points that taking the stream apart this far reads."""
    names = ["hook_embed", f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]
    for layer in range(model.cfg.n_layers):
        names.append(f"blocks.{layer}." + ("hook_attn_out" if parts == "component" else "attn.hook_z"))
        sparse = isinstance(model.blocks[layer].mlp, Moe)
        if parts in ("component", "head") or (parts == "expert" and not sparse):
            names.append(f"blocks.{layer}.hook_mlp_out")
        elif sparse:
            slots = "hook_expert_out" if parts == "expert" else "hook_expert_post"
            names += [f"blocks.{layer}.mlp.{leaf}" for leaf in (slots, "hook_expert_ids", "hook_routing_weights")]
        else:
            names.append(f"blocks.{layer}.mlp.hook_post")
    return names


def _attention_parts(
    model: Llama, here: ActivationCache, layer: int, direction: Tensor, parts: str
) -> Iterator[pl.DataFrame]:
    if parts == "component":
        yield _rows("attn", layer, {}, (wide(here["attn_out", layer]) * direction).sum(-1)[:, None])
        return
    block: Any = model.blocks[layer]
    by_head = wide(block.attn.o_proj.weight).unflatten(1, (-1, model.cfg.d_head))  # [d_model head d_head]
    values = torch.einsum("bhd,bhd->bh", wide(here["z", layer]), torch.einsum("bm,mhd->bhd", direction, by_head))
    yield _rows("head", layer, {"head": torch.arange(model.cfg.n_heads)}, values)


def _mlp_parts(
    model: Llama, here: ActivationCache, layer: int, direction: Tensor, parts: str
) -> Iterator[pl.DataFrame]:
    mlp: Any = model.blocks[layer].mlp
    sparse = isinstance(mlp, Moe)
    if parts in ("component", "head") or (parts == "expert" and not sparse):
        yield _rows("mlp", layer, {}, (wide(here["mlp_out", layer]) * direction).sum(-1)[:, None])
    elif not sparse:
        values = wide(here["post", layer]) * (direction @ wide(mlp.down_proj.weight))  # [batch d_mlp]
        yield _rows("neuron", layer, {"neuron": torch.arange(values.shape[1])}, values)
    else:
        ids, weights = here["expert_ids", layer], wide(here["routing_weights", layer])  # [batch k] both
        if parts == "expert":
            values = torch.einsum("bkm,bm->bk", wide(here["expert_out", layer]), direction) * weights
            yield _rows("expert", layer, {"expert": ids}, values)
        else:
            read = torch.einsum("bm,bkmf->bkf", direction, wide(mlp.down[ids]))  # [batch k d_expert]
            values = wide(here["expert_post", layer]) * read * weights[..., None]
            neurons = torch.arange(values.shape[-1]).expand_as(values)
            experts = ids[..., None].expand_as(values)
            labels = {"expert": experts.flatten(1), "neuron": neurons.flatten(1)}
            yield _rows("neuron", layer, labels, values.flatten(1))


def _edited_layers(model: Llama) -> set[int]:
    """The layers in which interventions are attached. Raises InterventionError for those on the final norm."""
    points = [edit.point.name for batch in model.batches for edit in batch.edits]
    if final := [name for name in points if name.startswith("ln_final")]:
        raise InterventionError(
            f"direct logit attribution: expected the final norm as it is, got an intervention at {final[0]}."
        )
    return {int(name.split(".")[1]) for name in points if name.startswith("blocks.")}


def _beside(here: ActivationCache, layer: int, direction: Tensor, written: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """What a layer changed in the stream without being one of its parts."""
    before = here["hook_embed"] if layer == 0 else here["resid_post", layer - 1]
    whole = ((wide(here["resid_post", layer]) - wide(before)) * direction).sum(-1)  # [batch]
    parts = pl.concat(written).group_by("pair").agg(pl.col("value").sum()).sort("pair")["value"].to_torch()
    return _rows("intervention", layer, {}, (whole - parts.to(whole))[:, None])


def _rows(component: str, layer: int | None, labels: dict[str, Tensor], values: Tensor) -> pl.DataFrame:
    """Rows of one kind of part from values [batch part]; labels are [part], or [batch part] where rows differ."""
    columns: dict[str, Any] = {"pair": torch.arange(len(values))[:, None].expand_as(values)}
    columns |= {
        name: labels[name].to("cpu").expand_as(values) for name in ("head", "expert", "neuron") if name in labels
    }
    frame = pl.DataFrame({name: tensor.flatten().numpy() for name, tensor in columns.items()})
    missing = [pl.lit(None, pl.Int64).alias(name) for name in ("head", "expert", "neuron") if name not in labels]
    return frame.with_columns(
        *missing,
        component=pl.lit(component),
        layer=pl.lit(layer, pl.Int64),
        value=pl.Series(values.float().cpu().flatten().numpy()),
    ).select("pair", "component", "layer", "head", "expert", "neuron", "value")


def _places(tokens: Tensor, pos: int | None) -> list[int]:
    return list(range(tokens.shape[1])) if pos is None else [column(pos, tokens.shape[1])]


def _grid(values: dict[str, Tensor], places: Sequence[int], slots: bool = False) -> pl.DataFrame:
    """A frame from tensors [batch pos], or [batch pos k] with `slots`; one more axis becomes a list column."""
    first = next(iter(values.values()))
    n_axes = 3 if slots else 2
    index = torch.meshgrid(*(torch.arange(size) for size in first.shape[:n_axes]), indexing="ij")
    columns: dict[str, Any] = {
        "pair": index[0].flatten().numpy(),
        "pos": torch.tensor(places)[index[1]].flatten().numpy(),
    }
    for name, tensor in values.items():
        flat = (tensor.float() if tensor.is_floating_point() else tensor).cpu().flatten(0, n_axes - 1)
        columns[name] = flat.numpy() if flat.ndim == 1 else flat.tolist()
    return pl.DataFrame(columns)


def _without_padding(frame: pl.DataFrame, attention_mask: Tensor | None) -> pl.DataFrame:
    if attention_mask is None:
        return frame
    pair, pos = attention_mask.bool().nonzero(as_tuple=True)
    return frame.join(pl.DataFrame({"pair": pair.numpy(), "pos": pos.numpy()}), on=["pair", "pos"], how="semi")


def _named(frame: pl.DataFrame) -> pl.DataFrame:
    """Rows of tokens have no names; their numbers stand as text, as pairs are named in every other experiment."""
    return frame.with_columns(pl.col("pair").cast(pl.String))
