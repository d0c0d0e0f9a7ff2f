"""One checkpoint's routers on another's hidden states: did the router change, or what it reads?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl
import torch
from torch import Tensor

from workbench.capture import pad, routed_layers
from workbench.errors import ConfigError
from workbench.experiments.identity import describe_model, sequences_digest
from workbench.experiments.result import Result
from workbench.hooks import HookPoint
from workbench.models import Llama
from workbench.models.recording import routing_values


@torch.inference_mode()
def exchanged_routing(
    states: Llama, routers: Llama, doc_ids: Sequence[str], sequences: Sequence[Sequence[int]]
) -> Result:
    """What the routers of `routers` would choose on the hidden states of `states`: `frame` is a routing frame.

    Columns doc_id, pos, layer, expert_ids, routing_weights, router_entropy, router_margin. `states` runs undisturbed,
    by its own routing; with routers=states the frame is its own routing. This is what `drift.decompose_drift` calls
    "ab" and "ba". Raises ConfigError for models of different shapes.
    """
    layers = routed_layers(states)
    if (layers, states.cfg.d_model) != (routed_layers(routers), routers.cfg.d_model):
        raise ConfigError("models: expected the same layers and width, got others. Compare checkpoints of one lineage.")
    tokens, mask = pad(sequences, left=False)
    real = mask.bool().to(states.device)
    found: dict[int, dict[str, Tensor]] = {}

    def read(x: Tensor, hook: HookPoint) -> None:  # what the router reads [batch pos d_model]
        found[hook.layer()] = _choose(routers, hook.layer(), x[real])

    with states.hooks(fwd_hooks=[(f"blocks.{layer}.ln2.hook_normalized", read) for layer in layers]):
        states(tokens.to(states.device), mask.to(states.device), stop_at_layer=states.cfg.n_layers)
    owner = pl.DataFrame({"doc_id": list(doc_ids), "pos": [list(range(len(ids))) for ids in sequences]}).explode("pos")
    frames = [
        owner.with_columns(pl.lit(layer).alias("layer"), *(_column(n, found[layer][n]) for n in _COLUMNS))
        for layer in layers
    ]
    settings = {
        "experiment": "exchanged_routing", "states": describe_model(states), "routers": describe_model(routers),
        "docs": list(doc_ids), "n_sequences": len(sequences), "sequences": sequences_digest(sequences),
    }  # fmt: skip
    return Result(pl.concat(frames), settings)


_COLUMNS = ("expert_ids", "routing_weights", "router_entropy", "router_margin")


def _choose(model: Llama, layer: int, x: Tensor) -> dict[str, Tensor]:  # [token d_model]
    """The model's own router, top-k and weights on foreign input."""
    moe: Any = model.blocks[layer].mlp
    logits = x.float() @ moe.router.weight.float().T.to(x.device)  # [token expert]
    weights, ids = logits.softmax(-1).topk(model.cfg.k, dim=-1)  # type: ignore[union-attr]
    if model.cfg.norm_topk_prob:  # type: ignore[union-attr]
        weights = weights / weights.sum(-1, keepdim=True)
    return routing_values(logits, ids, weights)


def _column(name: str, values: Tensor) -> pl.Series:
    return pl.Series(name, values.cpu().numpy().tolist() if values.ndim == 2 else values.cpu().numpy())
