"""Autoregressive generation with a key-value cache: batched, left padding exact, hooks active throughout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import ShapeError
from workbench.models.layers import check_mask, check_tokens

if TYPE_CHECKING:
    from workbench.interventions import Intervention, Interventions
    from workbench.models.llama import Llama


@dataclass(frozen=True)
class Generation:
    """Prompts and their continuations.

    `tokens` [batch pos] holds the prompt as given and then what was written; after a stop token a row is filled with
    the pad id. `attention_mask` [batch pos] is 0 at padding on either side. `n_prompt` is where continuations start.
    """

    tokens: Tensor
    attention_mask: Tensor
    n_prompt: int

    def continuations(self) -> list[list[int]]:
        """The ids written for each row, its stop token included, padding removed."""
        new, kept = self.tokens[:, self.n_prompt :], self.attention_mask[:, self.n_prompt :].bool()
        return [row[keep].tolist() for row, keep in zip(new, kept, strict=True)]


@torch.no_grad()
def generate(
    model: Llama,
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    stop_ids: Sequence[int] | None = None,
    pad_id: int = 4,
    seed: int | None = None,
    interventions: Interventions | Sequence[Intervention] = (),
) -> Generation:
    """Continue each row until it writes a stop id or `max_new_tokens`.

    Args:
        tokens: prompts [batch pos], padded on the left if they differ in length (then pass `attention_mask`).
        temperature: 0 takes the most probable token; above 0 samples from softmax(logits / temperature).
        stop_ids: ids that end a row; by default the model's own, which are <|return|> and <|call|>.
        seed: makes sampling repeatable; drawn on the CPU, so that devices agree.
        interventions: act on every pass, on the prompt and on what is written.

    Raises ShapeError when the prompt is padded on the right or does not leave room for a new token.
    """
    check_tokens(tokens, model.cfg)
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
    stop_ids = list(model.stop_ids if stop_ids is None else _id_list(stop_ids))
    _check(model, tokens, mask, max_new_tokens, temperature)
    _check_ids(model, {"stop_ids": stop_ids, "pad_id": [pad_id]})
    stops = torch.tensor(stop_ids, dtype=tokens.dtype)
    generator = None if seed is None else torch.Generator().manual_seed(_seed(seed))
    cache = model.new_cache(tokens.shape[0], tokens.shape[1] + max_new_tokens)
    written, kept = [tokens.cpu()], [mask.cpu()]
    running = torch.ones(tokens.shape[0], dtype=torch.bool)
    with model.intervene(interventions):
        logits = _last_logits(model, tokens, attention_mask, cache)
        for step in range(max_new_tokens):
            chosen = torch.where(running, _choose(logits, temperature, generator), pad_id)  # [batch]
            written.append(chosen[:, None])
            kept.append(running[:, None].to(mask.dtype))
            running = running & ~torch.isin(chosen, stops)
            if not running.any() or step + 1 == max_new_tokens:
                break
            # a row that has stopped still takes part, so that the batch keeps its shape, but as padding
            logits = _last_logits(model, chosen[:, None], None if running.all() else running[:, None].long(), cache)
    return Generation(torch.cat(written, dim=1), torch.cat(kept, dim=1), tokens.shape[1])


def _last_logits(model: Llama, tokens: Tensor, mask: Tensor | None, cache: object) -> Tensor:  # float32 [batch d_vocab]
    resid = model(tokens, mask, cache=cache, stop_at_layer=model.cfg.n_layers)  # [batch pos d_model]
    return model.unembed(model.ln_final(resid[:, -1:]))[:, -1].float().cpu()  # only the last position is unembedded


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:  # [batch]
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits - logits.max(-1, keepdim=True).values  # so that dividing by next to nothing leaves a 0
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


def _id_list(ids: Sequence[int]) -> Sequence[int]:
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise ShapeError(f"stop_ids: expected a list of token ids, got {ids!r}. Write [{ids!r}].")
    return ids


def _check_ids(model: Llama, given: dict[str, Sequence[int]]) -> None:
    for name, ids in given.items():
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < model.cfg.d_vocab:  # a bool is no id
                raise ShapeError(
                    f"{name}: expected ids from 0 to {model.cfg.d_vocab - 1}, got {token_id!r}. "
                    "Use the tokenizer of this checkpoint."
                )


def _seed(seed: int) -> int:
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ShapeError(f"seed: expected a whole number from 0 to 2**63 - 1, got {seed!r}.")
    return seed


def _check(model: Llama, tokens: Tensor, mask: Tensor, max_new_tokens: int, temperature: float) -> None:
    check_mask(mask, (tokens.shape[0], tokens.shape[1]))
    if not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
        raise ShapeError(f"temperature: expected 0 or a positive number, got {temperature!r}.")
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ShapeError(f"max_new_tokens: expected at least 1, a whole number, got {max_new_tokens!r}.")
    room = model.cfg.n_ctx - tokens.shape[-1]
    if max_new_tokens > room:
        raise ShapeError(
            f"max_new_tokens: expected at most {room} after a prompt of {tokens.shape[-1]} in a context of "
            f"{model.cfg.n_ctx}, got {max_new_tokens}. Shorten either."
        )
    if not bool(mask[:, -1].all()):
        raise ShapeError(
            "attention_mask: expected padding on the left, got a padded last position. Pad prompts on the left."
        )
