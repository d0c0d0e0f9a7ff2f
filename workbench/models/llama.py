"""The dense model, whole: embedding, blocks, final norm, unembedding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from workbench.config import ModelConfig
from workbench.errors import ConfigError, ShapeError
from workbench.hooks import HookedModel, HookPoint
from workbench.interventions.base import Intervention
from workbench.interventions.lowering import InterventionRow, intervention_table
from workbench.interventions.session import Attachable, as_interventions
from workbench.interventions.where import Batch
from workbench.models.attention import ATTENTION_IMPLEMENTATIONS, Attention
from workbench.models.cache import CacheRows, FixedCache, KVCache, Prefix
from workbench.models.layers import (
    Frame,
    Linear,
    RMSNorm,
    SwiGLU,
    attend_mask,
    check_mask,
    check_tokens,
    rotary_frequencies,
)


class Llama(HookedModel):
    """A Llama decoder with hook points; the base of the sparse model too, which only swaps what a block holds.

    `load_model` sets `source`, `tokenizer`, `chat_template` and `stop_ids` (where generation ends) from the checkpoint.
    """

    def __init__(self, cfg: ModelConfig, attn_impl: str = "sdpa") -> None:
        super().__init__()
        if attn_impl not in ATTENTION_IMPLEMENTATIONS:
            raise ConfigError(f"attn_impl: expected one of {', '.join(ATTENTION_IMPLEMENTATIONS)}, got {attn_impl!r}.")
        self.cfg, self.attn_impl = cfg, attn_impl
        self.source: str | None = None
        self.expert_errors: Any = None  # frame of what quantising the experts cost, when it was done while loading
        self.tokenizer: Any = None
        self.chat_template: str | None = None
        self.stop_ids: tuple[int, ...] = (2, 13)  # <|return|> and <|call|>
        # from_pretrained: the plain constructor draws random weights, which are overwritten in any case
        self.embed = nn.Embedding.from_pretrained(torch.empty(cfg.d_vocab, cfg.d_model), freeze=False)
        self.hook_embed = HookPoint("batch pos d_model")
        self.blocks = nn.ModuleList(self.make_block(layer) for layer in range(cfg.n_layers))
        self.ln_final = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.unembed = Linear(cfg.d_model, cfg.d_vocab)
        if cfg.tie_embeddings:
            self.unembed.weight = self.embed.weight
        self.batches: list[Batch] = []  # of the interventions that are attached
        self.name_hook_points()

    def make_block(self, layer: int) -> Block:
        return Block(Attention(self.cfg, layer, qk_norm=False, attn_impl=self.attn_impl), SwiGLU(self.cfg), self.cfg)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def moe_impl(self) -> str | None:
        """Which implementation computes the experts; None in a dense model."""
        return None

    @property
    def moe_path(self) -> str | None:
        """Which of the Triton paths computes the experts, see `Qwen3Moe.moe_path`; None in a dense model."""
        return None

    @moe_path.setter
    def moe_path(self, path: str) -> None:
        raise ConfigError(f"moe_path: expected a mixture of experts, got {self.cfg.model_type!r}. It has no such path.")

    def forward(
        self,
        tokens: Tensor,  # [batch pos] integers; or the residual stream [batch pos d_model] with start_at_layer
        attention_mask: Tensor | None = None,  # [batch pos], 1 at tokens and 0 at padding, left or right
        *,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        cache: KVCache | None = None,
        interventions: Attachable | Sequence[Intervention] = (),
    ) -> Tensor:
        """Logits [batch pos d_vocab]; with `stop_at_layer` the residual stream that enters that layer.

        `start_at_layer` takes that residual stream instead of tokens: `model(model(t, stop_at_layer=3),
        start_at_layer=3)` equals `model(t)`. Positions are counted over the mask, so a padded prompt gives the same
        values as an unpadded one. `interventions` act in this pass alone, before any hook looks; for several passes
        use `intervene`. Raises ShapeError on tokens, masks or layers that do not fit, InterventionError likewise.
        """
        if interventions:
            with self.intervene(interventions):
                return self(
                    tokens, attention_mask, start_at_layer=start_at_layer, stop_at_layer=stop_at_layer, cache=cache
                )
        first, last = self._layer_range(start_at_layer, stop_at_layer)
        if start_at_layer is None:
            check_tokens(tokens, self.cfg)
            x = self.embed(tokens.to(self.device))  # [batch pos d_model]
        else:
            x = self._residual(tokens)
        partial = last - first < self.cfg.n_layers or x.requires_grad
        if cache is not None and partial and not isinstance(cache, Prefix):
            raise ShapeError(
                "cache: expected a run through all layers under torch.no_grad(), got a part of them or gradients. "
                "Leave start_at_layer and stop_at_layer out, or the cache."
            )
        frame = self._frame(x, attention_mask, cache)
        for batch in self.batches:
            given = tokens if start_at_layer is None else None
            continues = cache is not None and cache.n_seen > 0 and not isinstance(cache, Prefix)
            batch.begin(given, frame.positions.expand(x.shape[:2]), frame.valid, continues, cache)
        if start_at_layer is None:
            x = self.hook_embed(x)
        for block in self.blocks[first:last]:
            x = block(x, frame, cache)
        if cache is not None:
            cache.advance(x.shape[1])
        return x if stop_at_layer is not None else self.unembed(self.ln_final(x))

    def reach(
        self, start_at_layer: int | None = None, stop_at_layer: int | None = None, **kwargs: Any
    ) -> Callable[[str], bool]:
        """Which hook points a pass between these layers gets to, by name. Raises ShapeError as such a pass would."""
        first, last = self._layer_range(start_at_layer, stop_at_layer)

        def reached(name: str) -> bool:
            if name.startswith("blocks."):
                return first <= self.hook_dict[name].layer() < last
            return start_at_layer is None if name == "hook_embed" else stop_at_layer is None

        return reached

    def to_tokens(self, text: str | Sequence[str], bos: bool = True) -> Tensor:  # [batch pos]
        """Token ids of one text or several of equal length, each behind `<|startoftext|>` unless `bos` is False.

        The default is that of a prompt of its own, as documents were in pre-training; a rendered chat, which has none,
        goes through `workbench.chat`, and `model.tokenizer.to_tokens` leaves no default. Raises ShapeError when the
        texts differ in length.
        """
        if self.tokenizer is None:
            raise ConfigError("tokenizer: expected one, got a model without. Load a checkpoint that has it.")
        if not isinstance(text, Iterable):
            raise ShapeError(f"texts: expected a text or a list of them, got {text!r}. Pass strings.")
        rows = [self.tokenizer.to_tokens(one, bos=bos) for one in ([text] if isinstance(text, str) else text)]
        if len({len(row) for row in rows}) != 1:
            raise ShapeError(
                f"texts: expected one or more of equal length, got {[len(row) for row in rows]} tokens. "
                "Pad them and pass an attention_mask."
            )
        return torch.tensor(rows)

    def new_cache(self, batch: int, n_ctx: int, growing: bool = False) -> KVCache:
        """An empty cache for `n_ctx` positions of `batch` sequences, to pass as `cache=` to successive calls."""
        return KVCache(self.cfg, batch, n_ctx, self.dtype, self.device, growing)

    @contextmanager
    def intervene(self, interventions: Attachable | Intervention | Sequence[Intervention]) -> Iterator[Llama]:
        """Interventions act on every pass inside the `with` block, generation included; nothing stays attached.

        Pass `Interventions(items, label=..., langs=...)` when they are limited by segment or language, `PerRow` when
        the rows of a batch have interventions of their own.
        """
        with as_interventions(interventions).attach(self):
            yield self

    def intervention_table(self) -> list[InterventionRow]:
        """What is attached right now, in the order in which it acts, and whether it ran in the kernels or as a hook."""
        return intervention_table(self)

    def generate(self, tokens: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Continue prompts [batch pos], left-padded if padded; see `workbench.models.generate.generate`."""
        from workbench.models.generate import generate

        return generate(self, tokens, attention_mask, **kwargs)

    def _layer_range(self, start: int | None, stop: int | None) -> tuple[int, int]:
        first, last = start or 0, self.cfg.n_layers if stop is None else stop
        if {type(first), type(last)} != {int} or not 0 <= first <= last <= self.cfg.n_layers:
            raise ShapeError(
                f"start_at_layer, stop_at_layer: expected 0 <= start <= stop <= {self.cfg.n_layers}, "
                f"got {start}, {stop}."
            )
        return first, last

    def _residual(self, x: Tensor) -> Tensor:
        d_model, fits = self.cfg.d_model, isinstance(x, Tensor) and x.ndim == 3 and x.numel() > 0
        if not fits or x.shape[-1] != d_model or x.dtype != self.dtype:
            got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ShapeError(
                f"start_at_layer: expected a residual stream [batch pos {d_model}] {self.dtype}, got {got}. "
                "Pass what stop_at_layer returned."
            )
        x = x.to(self.device)
        # a hook may edit in place, and this is the caller's tensor
        return x.clone() if any(point.listened for point in self.hook_dict.values()) else x

    def _frame(self, x: Tensor, attention_mask: Tensor | None, cache: KVCache | None) -> Frame:
        """Positions, rotary angles and masks of this pass; with a cache it continues where the cache ends."""
        batch, n_pos = x.shape[:2]
        n_past = cache.n_seen if cache else 0
        if n_past + n_pos > self.cfg.n_ctx:
            raise ShapeError(
                f"pos: expected at most {self.cfg.n_ctx} positions, got {n_past + n_pos}. Shorten the input."
            )
        valid = None
        if attention_mask is not None:
            valid = check_mask(attention_mask, (batch, n_pos), may_be_empty=cache is not None).to(x.device)
        if cache is not None:
            cache.admit(batch, n_pos, valid)
            seen = cache.valid[:, : n_past + n_pos] if cache.padded else None
        else:
            seen = valid
        if isinstance(cache, CacheRows | FixedCache):
            positions, valid, mask = cache.positions(x.device), cache.real(x.device), cache.mask()
        elif seen is None:
            positions = torch.arange(n_past, n_past + n_pos, device=x.device)[None]  # [1 pos]
            # sdpa's own causal mask fits a whole sequence or a single new position, not a chunk after a cache
            plain = n_past == 0 or n_pos == 1
            mask = None if plain else attend_mask(x.new_ones(1, n_past + n_pos, dtype=torch.bool), n_pos)
        else:
            positions = (seen.cumsum(1) - 1).clamp(min=0)[:, n_past:]  # [batch pos], counted over tokens only
            mask = attend_mask(seen, n_pos)
        frequencies = rotary_frequencies(self.cfg.rope, self.cfg.d_head, x.device)
        angles = positions[:, :, None, None] * frequencies  # [batch pos 1 d_head/2]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        return Frame(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1), mask, valid, positions)


class Block(nn.Module):
    """One layer: attention and MLP, each reading the normalised residual stream and adding to it."""

    def __init__(self, attn: Attention, mlp: nn.Module, cfg: ModelConfig) -> None:
        super().__init__()
        self.hook_resid_pre = HookPoint("batch pos d_model")
        self.ln1 = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attn = attn
        self.hook_attn_out = HookPoint("batch pos d_model")
        self.hook_resid_mid = HookPoint("batch pos d_model")
        self.ln2 = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mlp = mlp
        self.hook_mlp_out = HookPoint("batch pos d_model")
        self.hook_resid_post = HookPoint("batch pos d_model")

    def forward(self, x: Tensor, frame: Frame, cache: KVCache | None) -> Tensor:  # [batch pos d_model]
        x = self.hook_resid_pre(x)
        x = self.hook_resid_mid(x + self.hook_attn_out(self.attn(self.ln1(x), frame, cache)))
        return self.hook_resid_post(x + self.hook_mlp_out(self.mlp(self.ln2(x), frame.valid)))
