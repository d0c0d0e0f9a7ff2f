"""TransformerLens' analysis tools on our models: patching, ActivationCache, attribution, lenses.

Those tools ask a model for TransformerLens' configuration, its cache class and weights in its layout. `as_bridge` adds
these around a model and computes nothing itself; names and hook functions are the model's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.activations import unknown_name
from workbench.config import Qwen3MoeConfig
from workbench.errors import ConfigError, HookError
from workbench.hooks import HookFn, HookPoint, NameFilter
from workbench.interop.tl_weights import BlockView, no_neurons
from workbench.models import Llama
from workbench.models.layers import rms_norm

try:
    from transformer_lens import ActivationCache
    from transformer_lens.config import TransformerLensConfig
except ImportError as error:
    raise ConfigError(
        "transformer_lens: expected the package to be installed, got none. pip install 'llm-jp-4-workbench[interp]'."
    ) from error

_NOT_BY_DEFAULT = ("hook_result", "hook_expert_pre", "hook_expert_pre_linear", "hook_expert_post", "hook_expert_out")
_NEURONS = (".mlp.hook_pre", ".mlp.hook_pre_linear", ".mlp.hook_post")
Hooks = Iterable[tuple[NameFilter, HookFn]]


def as_bridge(model: Llama) -> Bridge:
    """A view of `model`, sharing its weights and hook points, that TransformerLens 4.3's tools accept."""
    return Bridge(model)


def tl_config(model: Llama) -> TransformerLensConfig:
    """The model's sizes as TransformerLens spells them."""
    cfg = model.cfg
    moe: dict[str, Any] = (
        {"num_experts": cfg.n_experts, "experts_per_token": cfg.k} if isinstance(cfg, Qwen3MoeConfig) else {}
    )
    config = TransformerLensConfig(
        d_model=cfg.d_model, d_head=cfg.d_head, n_layers=cfg.n_layers, n_ctx=cfg.n_ctx, n_heads=cfg.n_heads,
        d_mlp=cfg.d_mlp, d_vocab=cfg.d_vocab, device=str(model.device), dtype=model.dtype, act_fn="silu",
        n_key_value_heads=None if cfg.n_kv_heads == cfg.n_heads else cfg.n_kv_heads, gated_mlp=True, eps=cfg.norm_eps,
        normalization_type="RMS", uses_rms_norm=True, final_rms=True, positional_embedding_type="rotary", **moe,
    )  # fmt: skip
    config.model_name = model.source or cfg.model_type
    return config


class Bridge(nn.Module):
    """What TransformerLens' tools call: `cfg`, `run_with_cache`, `hooks`, `blocks[0].attn.W_O`, `W_U` ...

    The points of a mixture of experts have a second name without `mlp.` ("blocks.0.hook_router_logits"), which is how
    `generic_activation_patch` and `cache["router_logits", 0]` look for them. Layouts are the workbench's: router
    tensors [batch pos expert], where TransformerLens' own bridge flattens batch and pos.

    The final norm has a weight, and nothing is folded: `W_U` is the raw unembedding, while
    `tokens_to_residual_directions` includes the norm's weight, so that `logit_attrs` of all components sums to the
    logit. Per-neuron results exist for dense MLPs only; for experts use `workbench.experiments.lens`.
    """

    blocks: Any
    model: Llama

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.cfg = tl_config(model)
        self.tokenizer = model.tokenizer
        self.embed, self.ln_final, self.unembed = model.embed, model.ln_final, model.unembed
        self.blocks = nn.ModuleList(BlockView(block) for block in model.blocks)
        self.__dict__["model"] = model  # not as a submodule: everything above already is one
        self._aliases = {
            name.replace(".mlp.", "."): name for name in model.hook_dict if "expert" in name or "rout" in name
        }
        self._forks = {f"blocks.{layer}.attn.hook_q_input": layer for layer in range(model.cfg.n_layers)}
        self.hook_dict: dict[str, HookPoint] = model.hook_dict | {
            alias: model.hook_dict[name] for alias, name in self._aliases.items()
        }
        self.mod_dict: dict[str, nn.Module] = {**model.mod_dict, **self.hook_dict}
        self.training = self.blocks.training = model.training

    def forward(self, input: Any, return_type: str | None = "logits", **kwargs: Any) -> Any:
        """Logits [batch pos d_vocab] of a text or tokens; `return_type` "loss", "both" or None as TransformerLens'."""
        tokens = self.to_tokens(input) if isinstance(input, str | list) else input
        logits = self.model(tokens, **kwargs)
        if return_type in ("logits", None):
            return logits if return_type else None
        if return_type not in ("loss", "both"):
            raise ConfigError(f"return_type: expected logits, loss, both or None, got {return_type!r}.")
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten().to(logits.device))
        return loss if return_type == "loss" else (logits, loss)

    # ---- hooks

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Bridge]:
        """As the model's own; hooks never outlive the block, whatever `reset_hooks_end` says."""
        forward = [pair for names, fn in fwd_hooks for pair in self._resolved(names, fn)]
        backward = [(self._plain(names), fn) for names, fn in bwd_hooks]
        with self.model.hooks(forward, backward):
            yield self

    def run_with_hooks(
        self,
        *args: Any,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> Any:
        with self.hooks(fwd_hooks, bwd_hooks):
            return self(*args, **kwargs)

    def run_with_cache(
        self,
        *args: Any,
        names_filter: NameFilter | None = None,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """(output, TransformerLens' ActivationCache), by default of everything but per-head and per-expert outputs."""
        found: dict[str, Tensor] = {}
        edited = any(point.listened for point in self.model.hook_dict.values())  # perhaps in place, after we look

        def keep(x: Tensor, hook: HookPoint) -> None:
            kept = x.detach() if device is None else x.detach().to(device)
            kept = kept.clone() if edited else kept
            found[hook.name] = kept[0] if remove_batch_dim and hook.shape.startswith("batch") else kept

        with self.model.hooks([(self._wanted(names_filter), keep)]):
            output = self(*args, **kwargs)
        found |= {alias: found[name] for alias, name in self._aliases.items() if name in found}
        return output, Cache(found, self, has_batch_dim=not remove_batch_dim) if return_cache_object else found

    def reset_hooks(self, *args: Any, **kwargs: Any) -> None:
        self.model.reset_hooks()

    def _wanted(self, names: NameFilter | None) -> list[str]:
        if names is None:
            return [name for name in self.model.hook_dict if not name.endswith(_NOT_BY_DEFAULT)]
        if callable(names):
            return sorted({self._aliases.get(name, name) for name in self.hook_dict if names(name)})
        return [self._plain(name) for name in ([names] if isinstance(names, str) else names)]  # type: ignore[misc]

    def _plain(self, names: NameFilter) -> NameFilter:
        if callable(names):
            return names
        if not isinstance(names, str):
            return [self._aliases.get(name, name) for name in names]
        if names not in self.hook_dict:
            raise HookError(unknown_name(names, self.hook_dict))
        return self._aliases.get(names, names)

    def _resolved(self, names: NameFilter, fn: HookFn) -> list[tuple[NameFilter, HookFn]]:
        if isinstance(names, str) and names in self._forks:
            if not self.cfg.use_split_qkv_input:
                raise HookError(f"{names}: expected set_use_split_qkv_input(True) first, got a hook without it.")
            return _query_fork(self.model, self._forks[names], names, fn)
        return [(self._plain(names), fn)]

    def set_use_split_qkv_input(self, value: bool) -> None:
        """Allow hooks at `attn.hook_q_input`, each head's own copy of the residual stream before ln1."""
        self.cfg.use_split_qkv_input = value

    # ---- tokens and weights

    def to_tokens(self, input: str | Sequence[str], prepend_bos: bool = True, **kwargs: Any) -> Tensor:
        """Token ids [batch pos] of texts, which must have the same number of tokens."""
        return self.model.to_tokens(input, prepend_bos)

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token. Raises ConfigError when it is not."""
        ids = self.model.to_tokens(string, False)[0].tolist()
        if len(ids) != 1:
            raise ConfigError(f"{string!r}: expected a single token, got {len(ids)}. Pass token ids.")
        return int(ids[0])

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Tensor:  # [... d_model]
        """The direction that a token's logit reads after division by the final scale: ln_final.weight * W_U."""
        ids = torch.as_tensor(
            self.to_single_token(tokens) if isinstance(tokens, str) else tokens, device=self.W_U.device
        )
        return self.unembed.weight[ids.squeeze()] * self.ln_final.weight

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> Tensor:
        """Zeros [d_model]: these architectures have no bias anywhere."""
        return self.W_U.new_zeros(self.cfg.d_model)

    @property
    def W_E(self) -> Tensor:  # [d_vocab d_model]
        return self.embed.weight

    @property
    def W_U(self) -> Tensor:  # [d_model d_vocab]
        return self.unembed.weight.T

    @property
    def b_U(self) -> Tensor:  # [d_vocab]
        return self.W_U.new_zeros(self.cfg.d_vocab)

    @property
    def W_O(self) -> Tensor:  # [layer head d_head d_model]
        return torch.stack([block.attn.W_O for block in self.blocks])


class Cache(ActivationCache):
    """TransformerLens' cache; it refuses the dense neurons of a mixture of experts, however they are asked for.

    `get_full_resid_decomposition` runs with `expand_neurons=False`. Raises HookError for neurons of a sparse layer.
    """

    def __getitem__(self, key: Any) -> Tensor:
        try:
            found: Tensor = super().__getitem__(key)
        except KeyError as error:
            name = str(error.args[0])
            if name.endswith(_NEURONS) and name not in self.model.hook_dict:
                raise no_neurons(name) from None
            raise
        return found


def _query_fork(model: Llama, layer: int, name: str, fn: HookFn) -> list[tuple[NameFilter, HookFn]]:
    """Hooks on resid_pre and q that together give `fn` each head's own copy of the residual stream."""
    block: Any = model.blocks[layer]
    point = HookPoint("batch pos head d_model")
    point.name = name
    streams: list[Tensor] = []

    def remember(resid: Tensor, hook: HookPoint) -> None:
        streams[:] = [resid]

    def recompute(q: Tensor, hook: HookPoint) -> Tensor | None:  # [batch pos head d_head]
        fork = streams.pop().unsqueeze(2).expand(-1, -1, model.cfg.n_heads, -1)  # [batch pos head d_model]
        new = fn(fork, hook=point)
        if new is None:
            return None
        weight = block.attn.q_proj.weight.unflatten(0, (-1, model.cfg.d_head))  # [head d_head d_model]
        return torch.einsum("bphm,hdm->bphd", rms_norm(new, block.ln1.weight, model.cfg.norm_eps), weight)

    return [(f"blocks.{layer}.hook_resid_pre", remember), (f"blocks.{layer}.attn.hook_q", recompute)]
