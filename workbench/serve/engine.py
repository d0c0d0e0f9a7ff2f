"""The passes of a server: one chunk of a prompt, or one more token of up to a block of choices.

A prompt is read alone, in chunks that depend on nothing but itself; tokens are written in blocks of a fixed number of
rows (`workbench.models.blocks`). So each choice's arithmetic is the same whoever runs beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from workbench.chat import label_tokens
from workbench.hooks import HookPoint, only_looks
from workbench.interventions.lowering import attached
from workbench.interventions.where import Batch
from workbench.models import KVCache, Llama
from workbench.models.blocks import check_block, decode_block, unembed
from workbench.models.recording import routed_layers
from workbench.models.stopping import need_tokenizer
from workbench.serve.choice import Choice, logprobs_of
from workbench.serve.limits import PAGE, Limits, cache_positions, pages

SCORED = 64  # positions of a prompt that are unembedded at a time


class CachePool:
    """Caches for one sequence each, recycled; together they never hold more than `n_positions`."""

    def __init__(self, model: Llama, n_positions: int) -> None:
        self.n_positions, self.n_used = n_positions, 0
        self._model = model
        self._free: list[KVCache] = []

    @property
    def n_allocated(self) -> int:
        return self.n_used + sum(cache.n_ctx for cache in self._free)

    def take(self, n_positions: int) -> KVCache | None:
        """An empty cache for so many positions, or None while others hold too many."""
        needed = pages(n_positions)
        fitting = [cache for cache in self._free if cache.n_ctx >= needed]
        if fitting and self.n_used + min(cache.n_ctx for cache in fitting) <= self.n_positions:
            cache = min(fitting, key=lambda cache: cache.n_ctx)
            self._free.remove(cache)
        elif self.n_used + needed <= self.n_positions:
            while self._free and self.n_allocated + needed > self.n_positions:
                self._free.pop(0)
            cache = self._model.new_cache(1, needed)
        else:
            return None
        self.n_used += cache.n_ctx
        return cache

    def give_back(self, cache: KVCache) -> None:
        cache.n_seen, cache.padded = 0, False
        self.n_used -= cache.n_ctx
        self._free.append(cache)


class Engine:
    """Runs passes for choices; to be used from one thread. Raises ConfigError for a model that cannot be served."""

    def __init__(self, model: Llama, limits: Limits, free_bytes: int) -> None:
        self.model, self.limits = model, limits
        self.tokenizer = need_tokenizer(model.tokenizer, "serve")
        self.layers = routed_layers(model)
        self.pool = CachePool(model, cache_positions(limits, model.cfg, model.dtype.itemsize, free_bytes))
        if model.device.type == "cpu":
            check_block(model, limits.rows)

    @property
    def n_ctx(self) -> int:
        """The longest prompt and answer that can be asked for."""
        return min(self.model.cfg.n_ctx, self.pool.n_positions // PAGE * PAGE)  # a part of a page holds nothing

    @torch.inference_mode()
    def read(self, choice: Choice) -> None:
        """One more chunk of a prompt; after the last one the first token is written."""
        prompt, model = choice.ask.prompt, self.model
        part = prompt[choice.n_read : choice.n_read + self.limits.prefill_chunk]
        with self._intervened([choice], alone=True), self._routes([choice]):
            resid = model(torch.tensor([part]), cache=choice.cache, stop_at_layer=model.cfg.n_layers)
            normalized = model.ln_final(resid)  # [1 pos d_model]; its points may be intervened on too
        if choice.ask.score_prompt:
            self._score(choice, normalized)
        choice.n_read += len(part)
        if choice.n_read < len(prompt):
            return
        if not choice.ask.max_new_tokens:
            choice.reason = "length"
            return
        choice.begin_writing(model.cfg.d_vocab)
        choice.take(unembed(model, normalized[:, -1:])[0, 0])

    @torch.inference_mode()
    def write(self, choices: Sequence[Choice]) -> None:
        """One more token of each; of one that has ended, the pass that records its last token."""
        ids = [choice.written[-1] for choice in choices]
        caches = [choice.cache for choice in choices if choice.cache is not None]
        with self._intervened(choices, alone=False), self._routes(choices):
            logits = decode_block(self.model, ids, caches, self.limits.rows)  # [row d_vocab]
        for choice, row in zip(choices, logits, strict=True):
            if not choice.reason:
                choice.take(row)

    def is_complete(self, choice: Choice) -> bool:
        """Whether nothing is left to compute: a choice that keeps its routing has its last token routed too."""
        n_held = choice.cache.n_seen if choice.cache is not None else 0
        owed = choice.ask.routing and n_held < len(choice.ask.prompt) + len(choice.written)
        return bool(choice.reason) and not owed

    def _score(self, choice: Choice, normalized: Tensor) -> None:  # [1 pos d_model]
        targets = choice.ask.prompt[choice.n_read + 1 : choice.n_read + 1 + normalized.shape[1]]
        for start in range(0, len(targets), SCORED):
            ids = targets[start : start + SCORED]
            logits = unembed(self.model, normalized[:, start : start + len(ids)])[0]  # [pos d_vocab]
            choice.prompt_logprobs += logprobs_of(logits, ids, choice.ask.logprobs or 0)

    @contextmanager
    def _routes(self, choices: Sequence[Choice]) -> Iterator[None]:
        """Keep the routing of the choices that ask for it."""
        if not self.layers or not any(choice.ask.routing for choice in choices):
            yield
            return
        seen: dict[str, list[Tensor]] = {"expert_ids": [], "routing_weights": []}

        def keep(leaf: str, x: Tensor, hook: HookPoint) -> None:
            seen[leaf].append(x)

        names = [(f"blocks.{layer}.mlp.hook_{leaf}", leaf) for layer in self.layers for leaf in seen]
        with self.model.hooks([(name, only_looks(partial(keep, leaf))) for name, leaf in names]):
            yield
        ids, weights = (torch.stack(seen[leaf], dim=2).cpu() for leaf in seen)  # [row pos layer k]
        for row, choice in enumerate(choices):
            if choice.ask.routing:
                choice.routes.append((ids[row].to(torch.int16), weights[row].float()))

    @contextmanager
    def _intervened(self, choices: Sequence[Choice], alone: bool) -> Iterator[None]:
        """Each choice's own interventions act on its own row, as if it ran alone."""
        batches = []
        for row, choice in enumerate(choices):
            if choice.ask.items:
                choice.known = choice.known or self._known(choice)
                choice.known.row = None if alone else (row, self.limits.rows)
                batches.append(choice.known)
        # A layer may hand an edit to its kernels or leave it a hook, by what else is attached: the same in exact
        # arithmetic, and not to the bit. A listener at the logits makes all of a block's edits hooks, whoever is in it.
        points = [f"blocks.{layer}.mlp.hook_router_logits" for layer in self.layers] if batches and not alone else []
        with self.model.hooks([(points, _looks)] if points else []), attached(self.model, batches):
            yield

    def _known(self, choice: Choice) -> Batch:
        ask = choice.ask
        langs = None if ask.lang is None else [ask.lang]
        return Batch(ask.items, partial(label_tokens, tokenizer=self.tokenizer), langs, [len(ask.prompt)])


@only_looks
def _looks(x: Tensor, hook: HookPoint) -> None:
    return None
