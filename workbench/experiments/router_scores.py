"""Why was a token sent to these experts: each router logit taken apart into what wrote the residual stream.

A router logit is linear in the residual stream once the scale of the norm before it is frozen, and the stream is a sum
of the embedding and of what every attention layer and every MLP before it wrote (decomposition of router scores, ICLR
2026, openreview BqyPLOkxFY). `stats.router_scores` summarises the frame that this gives, over groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from torch import Tensor

from workbench.activations import ActivationCache
from workbench.capture import check_room, routed_layers, suitable_threads
from workbench.errors import ConfigError
from workbench.models import Llama
from workbench.models.layers import inverse_rms, wide

PARTS = ("component", "head")


@torch.inference_mode()
def router_scores(
    model: Llama, tokens: pl.DataFrame, layers: Sequence[int] | None = None, parts: str = "component"
) -> pl.DataFrame:
    """One row per token, routed layer, component and chosen expert.

    tokens: documents, axes.TOKEN_COLUMNS, rows of a document together, by pos. Columns doc_id, pos, layer, component
    ("embed", "attn.2", "mlp.1", with parts="head" "attn.2.5" for a head), expert, score, influence, rank_change. score:
    what the component adds to the expert's router logit, less the mean over experts, which no choice depends on; over
    components it sums to the centred logit. influence: variance over all experts of the component's scores.
    rank_change: how many ranks the expert moves when the component's scores are taken away, the scale of the norm left
    as it was (their AARV is its mean over the chosen experts). layers: all routed ones. Direct effects only: what a
    component changes through later ones is theirs. Raises ConfigError for a layer without experts or other `parts`.
    """
    known = routed_layers(model)
    wanted = list(known if layers is None else layers)
    if parts not in PARTS:
        raise ConfigError(f"parts: expected one of {', '.join(PARTS)}, got {parts!r}.")
    if not set(wanted) <= set(known):
        raise ConfigError(f"layers: expected some of {', '.join(map(str, known))}, got {wanted}.")
    documents = tokens.group_by("doc_id", maintain_order=True).agg("pos", "token_id")
    check_room(model, documents["token_id"].to_list(), 0)
    frames = []
    with suitable_threads(model):
        for doc_id, pos, ids in documents.rows():
            _, cache = model.run_with_cache(
                torch.tensor([ids], device=model.device),
                names_filter=_needed(wanted, parts),
                stop_at_layer=max(wanted) + 1,
            )
            for layer in wanted:
                names, written = _components(cache, layer, parts)
                rows = _rows(names, _scores(model, cache, layer, written), cache["expert_ids", layer][0].cpu().numpy())
                places = pl.Series("pos", pos)[rows["place"]]
                frames.append(rows.with_columns(places, doc_id=pl.lit(doc_id), layer=pl.lit(layer)))
    return pl.concat(frames).select(
        "doc_id", "pos", "layer", "component", "expert", "score", "influence", "rank_change"
    )


def _needed(layers: Sequence[int], parts: str) -> list[str]:
    names = ["hook_embed"]
    for layer in range(max(layers) + 1):
        names += [f"blocks.{layer}.attn.hook_result" if parts == "head" else f"blocks.{layer}.hook_attn_out"]
        names += [f"blocks.{layer}.hook_mlp_out"]
    for layer in layers:
        names += [f"blocks.{layer}.hook_resid_mid", f"blocks.{layer}.mlp.hook_expert_ids"]
    return names


def _components(cache: ActivationCache, layer: int, parts: str) -> tuple[list[str], Tensor]:
    """Names, and what each wrote into the stream before the layer's experts: [component pos d_model]."""
    names, written = ["embed"], [cache["hook_embed"]]
    for below in range(layer + 1):
        if parts == "head":
            heads = cache[f"blocks.{below}.attn.hook_result"]  # [1 pos head d_model]
            names += [f"attn.{below}.{head}" for head in range(heads.shape[2])]
            written += list(heads.unbind(2))
        else:
            names.append(f"attn.{below}")
            written.append(cache[f"blocks.{below}.hook_attn_out"])
        if below < layer:
            names.append(f"mlp.{below}")
            written.append(cache[f"blocks.{below}.hook_mlp_out"])
    return names, wide(torch.cat(written))


def _scores(model: Llama, cache: ActivationCache, layer: int, written: Tensor) -> np.ndarray:  # [component pos expert]
    scale = inverse_rms(cache["resid_mid", layer], model.cfg.norm_eps)  # [1 pos 1]
    gain = model.get_parameter(f"blocks.{layer}.ln2.weight")
    router = model.get_parameter(f"blocks.{layer}.mlp.router.weight")  # [expert d_model]
    scores = (written * scale * wide(gain)) @ wide(router).T
    return (scores - scores.mean(-1, keepdim=True)).cpu().numpy()


def _rows(names: list[str], scores: np.ndarray, ids: np.ndarray) -> pl.DataFrame:  # scores as above, ids [pos k]
    """place, component, expert, score, influence, rank_change: a row per component, position and chosen expert."""
    total = scores.sum(0)  # [pos expert]
    moved = np.abs(_ranks(total) - _ranks(total - scores))  # [component pos expert]
    chosen = np.broadcast_to(ids, (len(names), *ids.shape))
    columns = {
        "expert": chosen,
        "score": np.take_along_axis(scores, chosen, -1),
        "influence": np.broadcast_to(scores.var(-1)[..., None], chosen.shape),
        "rank_change": np.take_along_axis(moved, chosen, -1).astype(np.float64),
    }
    place = np.broadcast_to(np.arange(len(ids))[:, None], chosen.shape)
    return pl.DataFrame(
        {
            "place": place.ravel(),
            "component": np.repeat(names, ids.size),
            **{name: values.ravel() for name, values in columns.items()},
        }
    )


def _ranks(scores: np.ndarray) -> np.ndarray:  # [... expert], 0 the highest; the lowest id first among equals
    order = np.argsort(-scores, axis=-1, kind="stable")
    return np.argsort(order, axis=-1, kind="stable")
