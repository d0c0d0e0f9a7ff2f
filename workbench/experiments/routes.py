"""Counterfactual routes: would other experts have predicted the next token better than those the router chose?

At sampled positions the k experts of one layer are replaced by other sets of k, everything before the position as it
was, and the negative log-likelihood of the token that followed is compared (arXiv 2605.07260). `stats.routes` says how
much of a better route is the luck of having tried many.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from torch import Tensor
from tqdm import tqdm

from workbench.capture import check_room, routed_layers, suitable_threads
from workbench.errors import ConfigError
from workbench.hooks import HookPoint
from workbench.interventions.where import told
from workbench.models import Llama
from workbench.models.recording import router_margin
from workbench.stats.load import CONTENT_SEGMENTS


@torch.inference_mode()
def counterfactual_routes(
    model: Llama,
    tokens: pl.DataFrame,
    layers: Sequence[int] | None = None,
    n_positions: int = 8,
    n_alternatives: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> pl.DataFrame:
    """One row per document, sampled position, layer and route: columns doc_id, pos, layer, route, expert_ids, margin,
    nll.

    tokens: documents, axes.TOKEN_COLUMNS, rows of a document together, by pos. n_positions: sampled content tokens of a
    document whose next token is content too, all if it has fewer. route 0 is the router's own; the others are k experts
    drawn without replacement by the router's own probabilities (Gumbel top-k), none the router's set and no two
    alike, so they are routes that the router finds plausible; a token with few plausible ones has fewer. Weights are
    renormalised as the model does. nll: of the token that follows, in nats. margin: k-th less (k+1)-th router logit,
    how sure the router was. Raises ConfigError for a layer without experts.
    """
    known = routed_layers(model)
    wanted = list(known if layers is None else layers)
    if not set(wanted) <= set(known):
        raise ConfigError(f"layers: expected some of {', '.join(map(str, known))}, got {wanted}.")
    content = pl.col("segment").is_in(CONTENT_SEGMENTS)
    documents = tokens.group_by("doc_id", maintain_order=True).agg("pos", "token_id", content=content)
    check_room(model, documents["token_id"].to_list(), 0)
    rng, frames = np.random.default_rng(seed), []
    with suitable_threads(model):
        for doc_id, pos, ids, is_content in tqdm(documents.rows(), desc="routes", disable=None if progress else True):
            here = np.flatnonzero(np.array(is_content[:-1]) & np.array(is_content[1:]))
            chosen = np.sort(rng.choice(here, min(n_positions, len(here)), replace=False))
            if len(chosen):
                frame = _document(model, ids, chosen, wanted, n_alternatives, rng)
                places = pl.Series("pos", pos)[frame["place"]]
                frames.append(frame.with_columns(places, doc_id=pl.lit(doc_id)))
    columns = ("doc_id", "pos", "layer", "route", "expert_ids", "margin", "nll")
    return pl.concat(frames).select(columns) if frames else pl.DataFrame(schema=dict.fromkeys(columns, pl.Float64))


def _document(
    model: Llama, ids: list[int], positions: np.ndarray, layers: Sequence[int], n: int, rng: np.random.Generator
) -> pl.DataFrame:
    row = torch.tensor([ids], device=model.device)
    points = ("hook_resid_pre", "mlp.hook_router_logits", "mlp.hook_expert_ids")
    names = [f"blocks.{layer}.{point}" for layer in layers for point in points]
    _, cache = model.run_with_cache(row, names_filter=names, stop_at_layer=model.cfg.n_layers)
    rows = []
    for layer in layers:
        logits, own = cache["router_logits", layer][0].float().cpu(), cache["expert_ids", layer][0].cpu()
        margins = router_margin(logits, own.shape[1])
        for place in positions:
            routes = [own[place].tolist(), *_alternatives(logits[place].numpy(), own[place].numpy(), n, rng)]
            nll = _nll(model, row, cache["resid_pre", layer], layer, int(place), routes)
            for number, (experts, value) in enumerate(zip(routes, nll, strict=True)):
                rows.append((int(place), layer, number, experts, float(margins[place]), value))
    names = ["place", "layer", "route", "expert_ids", "margin", "nll"]
    return pl.DataFrame(rows, schema=names, orient="row")


def _alternatives(logits: np.ndarray, own: np.ndarray, n: int, rng: np.random.Generator) -> list[list[int]]:
    """Up to n sets of k experts, by descending logit; given up after 20 draws for each that is wanted."""
    k, seen = len(own), {frozenset(own.tolist())}
    found: list[list[int]] = []
    for _ in range(20 * n):
        drawn = np.argsort(-(logits + rng.gumbel(size=len(logits))))[:k]
        if len(found) < n and frozenset(drawn.tolist()) not in seen:
            seen.add(frozenset(drawn.tolist()))
            found.append(drawn[np.argsort(-logits[drawn], kind="stable")].tolist())
    return found


def _nll(model: Llama, row: Tensor, resid: Tensor, layer: int, place: int, routes: list[list[int]]) -> list[float]:
    """Of the token after `place` under each route there: the document up to it, once per route."""
    forced = torch.tensor(routes, device=model.device)  # [route k]

    def force(ids: Tensor, hook: HookPoint) -> Tensor:  # [route pos k]
        ids = ids.clone()
        ids[:, -1] = forced
        return ids

    prefix, start = row[:, : place + 1], resid[:, : place + 1].expand(len(routes), -1, -1)
    with told(model, prefix, None), model.hooks([(f"blocks.{layer}.mlp.hook_expert_ids", force)]):
        out = model(start, start_at_layer=layer, stop_at_layer=model.cfg.n_layers)
    log_probs = model.unembed(model.ln_final(out[:, -1:]))[:, 0].float().log_softmax(-1)  # [route d_vocab]
    return (-log_probs[:, row[0, place + 1]]).tolist()
