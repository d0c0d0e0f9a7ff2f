"""How far our models are from transformers': every layer's residual stream, router and experts, and the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

from workbench.hooks import HookPoint
from workbench.models import Llama

# The input of the unembedding has no hook point of its own in either library.
FINAL = "ln_final"
LOGITS = "logits"
Listener = Callable[[Any], Any]
_LAYER_POINTS = ("hook_resid_post", "mlp.hook_router_logits", "mlp.hook_expert_ids")


def parity(model: Llama, hf_model: Any, tokens: Tensor, attention_mask: Tensor | None = None) -> pl.DataFrame:
    """Compare `model` with transformers' model of the same checkpoint on tokens [batch pos], padding left out.

    One row per compared tensor, in order of execution: `name` (a hook name, "ln_final" for the final norm's output, or
    "logits"), `layer`, `max_abs_diff`, `scale` (largest magnitude in transformers' tensor), `relative_diff` (their
    ratio), and for expert ids instead `tokens_differ`, the number of tokens with other experts or another order.
    """
    ours = activations(model, tokens, attention_mask)
    theirs = hf_activations(hf_model, tokens, attention_mask)
    return compare(ours, theirs)


def compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> pl.DataFrame:
    """The frame of `parity` from two sets of activations."""
    schema = {"name": pl.String, "layer": pl.Int64, "max_abs_diff": pl.Float64, "scale": pl.Float64,
              "relative_diff": pl.Float64, "tokens_differ": pl.Int64}  # fmt: skip
    return pl.DataFrame([_compare_one(name, ours[name], theirs[name]) for name in theirs], schema=schema, orient="row")


@torch.no_grad()
def activations(
    model: Llama,
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    expert_ids: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Our residual streams, router logits and expert ids by hook name, then "ln_final" and "logits".

    Each is [token ...], the tokens that `attention_mask` keeps in row order. `expert_ids`, by hook name, forces the
    experts of every token; their weights are still this model's own.
    """
    kept = _kept(tokens, attention_mask)
    found: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: HookPoint) -> None:
        found[hook.name] = x[kept]

    def force(ids: Tensor, hook: HookPoint) -> Tensor:
        forced = ids.clone()
        forced[kept] = (expert_ids or {})[hook.name]
        return forced

    wanted = [name for name in model.hook_dict if name.split(".", 2)[-1] in _LAYER_POINTS]
    hooks = [(list(expert_ids), force)] if expert_ids else []
    with _listening([(model.ln_final, lambda output: found.update({FINAL: output[kept]}))]):
        logits = model.run_with_hooks(tokens, attention_mask=attention_mask, fwd_hooks=[*hooks, (wanted, keep)])
    return {**found, LOGITS: logits[kept]}


@torch.no_grad()
def hf_activations(
    hf_model: Any,
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    expert_ids: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The same as `activations`, from a LlamaForCausalLM or Qwen3MoeForCausalLM of transformers 5."""
    kept = _kept(tokens, attention_mask)
    found: dict[str, Tensor] = {}
    listeners: list[tuple[nn.Module, Listener]] = []
    for layer, block in enumerate(hf_model.model.layers):
        if hasattr(block.mlp, "gate"):
            listeners.append(
                (block.mlp.gate, _router_listener(block.mlp.gate, f"blocks.{layer}.mlp", kept, found, expert_ids))
            )
        listeners.append((block, _keeper(found, f"blocks.{layer}.hook_resid_post", kept)))
    listeners.append((hf_model.model.norm, _keeper(found, FINAL, kept)))
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # transformers counts padding as positions unless told
    with _listening(listeners):
        logits = hf_model(tokens, attention_mask=attention_mask, position_ids=positions, use_cache=False).logits
    return {**found, LOGITS: logits[kept]}


def _keeper(found: dict[str, Tensor], name: str, kept: Tensor) -> Listener:
    return lambda output: found.update({name: output[kept]})


def _router_listener(
    gate: Any, prefix: str, kept: Tensor, found: dict[str, Tensor], expert_ids: Mapping[str, Tensor] | None
) -> Listener:
    """Keeps what transformers' router put out, flat over batch and pos, and replaces its choice if asked to."""
    flat = kept.flatten()

    def listen(output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
        logits, weights, ids = output
        if expert_ids:
            ids = ids.clone()
            ids[flat] = expert_ids[f"{prefix}.hook_expert_ids"]
            weights = logits.softmax(-1, dtype=torch.float32).gather(-1, ids)
            weights = (weights / weights.sum(-1, keepdim=True) if gate.norm_topk_prob else weights).to(logits.dtype)
        found.update({f"{prefix}.hook_router_logits": logits[flat], f"{prefix}.hook_expert_ids": ids[flat]})
        return (logits, weights, ids) if expert_ids else None

    return listen


@contextmanager
def _listening(listeners: list[tuple[nn.Module, Listener]]) -> Iterator[None]:
    """Call each listener with its module's output; what it returns, unless None, replaces that output."""
    handles = [module.register_forward_hook(lambda _m, _i, output, fn=fn: fn(output)) for module, fn in listeners]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kept(tokens: Tensor, attention_mask: Tensor | None) -> Tensor:  # bool [batch pos]
    return torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()


def _compare_one(name: str, ours: Tensor, theirs: Tensor) -> tuple[object, ...]:
    layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
    if not ours.is_floating_point():
        return name, layer, None, None, None, int((ours != theirs).any(-1).sum())
    difference = float((ours.double() - theirs.double()).abs().max())
    scale = float(theirs.abs().max())
    return name, layer, difference, scale, difference / scale, None
