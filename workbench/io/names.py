"""Which tensor of a Hugging Face checkpoint fills which part of which parameter here.

Two layouts of the experts exist on disk. "per_expert" has three matrices per expert (what transformers 4 wrote and
transformers 5 still writes by default); "fused" has two stacked tensors per layer (transformers 5 in memory).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from workbench.config import ModelConfig, Qwen3MoeConfig
from workbench.errors import CheckpointError

Layout = Literal["per_expert", "fused"]

_FUSED_SUFFIX = ".mlp.experts.gate_up_proj"

TIED_HEAD = "lm_head.weight"


class Slot(NamedTuple):
    """Where one checkpoint tensor belongs: `param[expert, rows]`, or the whole parameter when both are None."""

    param: str
    expert: int | None = None
    rows: slice = slice(None)


def slot_part(params: Mapping[str, Tensor], slot: Slot) -> Tensor:
    """The view of a parameter that a slot means."""
    whole = params[slot.param]
    return whole if slot.expert is None else whole[slot.expert, slot.rows]


def slots(cfg: ModelConfig, layout: Layout) -> dict[str, Slot]:
    """Every tensor name a checkpoint of this model must hold, in the order of the model, and where it goes.

    Tied embeddings have no `lm_head.weight` entry. Raises CheckpointError for an unknown layout.
    """
    if layout not in get_args(Layout):
        raise CheckpointError(
            f"layout: expected one of {', '.join(get_args(Layout))}, got {layout!r}. Choose one of these."
        )
    table = {"model.embed_tokens.weight": Slot("embed.weight")}
    for layer in range(cfg.n_layers):
        table.update(_block_slots(cfg, layer, layout))
    table["model.norm.weight"] = Slot("ln_final.weight")
    if not cfg.tie_embeddings:
        table[TIED_HEAD] = Slot("unembed.weight")
    return table


def layout_of(names: Iterable[str]) -> Layout:
    """The layout that a checkpoint's tensor names show; a model without experts is "per_expert"."""
    return "fused" if any(name.endswith(_FUSED_SUFFIX) for name in names) else "per_expert"


def ignorable(cfg: ModelConfig) -> frozenset[str]:
    """Tensors that may lie in a checkpoint unread: rotary frequencies, which the config gives.

    transformers up to 4.31 stored them for every layer; later releases store none.
    """
    return frozenset(f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(cfg.n_layers))


def _block_slots(cfg: ModelConfig, layer: int, layout: Layout) -> Iterator[tuple[str, Slot]]:
    theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
    yield f"{theirs}.input_layernorm.weight", Slot(f"{ours}.ln1.weight")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", *(("q_norm", "k_norm") if cfg.is_moe else ())):
        yield f"{theirs}.self_attn.{name}.weight", Slot(f"{ours}.attn.{name}.weight")
    yield f"{theirs}.post_attention_layernorm.weight", Slot(f"{ours}.ln2.weight")
    if isinstance(cfg, Qwen3MoeConfig) and cfg.sparse_layers[layer]:
        yield f"{theirs}.mlp.gate.weight", Slot(f"{ours}.mlp.router.weight")
        yield from _expert_slots(cfg, f"{theirs}.mlp.experts", f"{ours}.mlp", layout)
    else:
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield f"{theirs}.mlp.{name}.weight", Slot(f"{ours}.mlp.{name}.weight")


def _expert_slots(cfg: Qwen3MoeConfig, theirs: str, ours: str, layout: Layout) -> Iterator[tuple[str, Slot]]:
    if layout == "fused":
        yield f"{theirs}.gate_up_proj", Slot(f"{ours}.gate_up")
        yield f"{theirs}.down_proj", Slot(f"{ours}.down")
        return
    for expert in range(cfg.n_experts):
        yield f"{theirs}.{expert}.gate_proj.weight", Slot(f"{ours}.gate_up", expert, slice(0, cfg.d_expert))
        yield f"{theirs}.{expert}.up_proj.weight", Slot(f"{ours}.gate_up", expert, slice(cfg.d_expert, None))
        yield f"{theirs}.{expert}.down_proj.weight", Slot(f"{ours}.down", expert)
