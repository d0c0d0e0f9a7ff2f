"""Autoregressive generation with a key-value cache: batched, left padding exact, hooks active throughout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import ShapeError
from workbench.models.fixed import FixedPasses, check_decode
from workbench.models.layers import check_mask, check_tokens
from workbench.models.moe import experts_at_hand
from workbench.models.passes import Passes
from workbench.models.recording import Record, Recorder
from workbench.models.room import check_room
from workbench.models.rows import Rows
from workbench.models.sampling import Sampler, Sampling, check_finite
from workbench.models.stopping import TextWatch, need_tokenizer

if TYPE_CHECKING:
    import polars as pl

    from workbench.interventions import Intervention
    from workbench.interventions.session import Attachable
    from workbench.models.llama import Llama

OnText = Callable[[int, str], object]


@dataclass(frozen=True)
class Generation:
    """Prompts and their continuations.

    `tokens` [batch pos] holds the prompt as given and then what was written; after a row ended it is filled with the
    pad id. `attention_mask` [batch pos] is 0 at padding on either side. `n_prompt` is where continuations start.
    `stopped` tells for each row what ended it: "stop_id", "stop_string" or "length". `record` is what was recorded.
    `decode` is how decoding ran, as it was asked for.
    """

    tokens: Tensor
    attention_mask: Tensor
    n_prompt: int
    stopped: tuple[str, ...] = ()
    record: Record = field(default_factory=Record)
    tokenizer: Any = None
    stop_strings: tuple[str, ...] = ()
    decode: str = "plain"

    def continuations(self) -> list[list[int]]:
        """The ids written for each row, its stop token included, padding removed."""
        new, kept = self.tokens[:, self.n_prompt :], self.attention_mask[:, self.n_prompt :].bool()
        return [row[keep].tolist() for row, keep in zip(new, kept, strict=True)]

    def texts(self) -> list[str]:
        """What each row wrote, special tokens by name, cut before a stop string that ended it."""
        tokenizer = need_tokenizer(self.tokenizer, "texts")
        found = []
        for row, ids in enumerate(self.continuations()):
            decoder = tokenizer.stream(text_start=tokenizer.is_special(int(self.tokens[row, self.n_prompt - 1])))
            watch = TextWatch(decoder, self.stop_strings if self.stopped[row] == "stop_string" else ())
            found.append("".join(map(watch.push, ids)) + watch.finish())
        return found

    def messages(self) -> list[list[Any]]:
        """Each row, prompt included, as a list of `workbench.chat.ParsedMessage`."""
        from workbench.transcript import messages

        return messages(self)

    def token_frame(self, doc_id: Sequence[str] | None = None) -> pl.DataFrame:
        """One row per token: doc_id, pos, token_id, token, segment, phase, as in a study's `tokens`."""
        from workbench.transcript import token_frame

        return token_frame(self, doc_id)

    def routing(self, doc_id: Sequence[str] | None = None) -> pl.DataFrame:
        """One row per (token, layer) with axes.ROUTING_COLUMNS, as in a study; needs record=["routing"]."""
        from workbench.transcript import routing_frame

        return routing_frame(self, doc_id)


def generate(
    model: Llama,
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] | None = None,
    stop_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    max_thinking_tokens: int | None = None,
    pad_id: int = 4,
    cache: str = "growing",
    decode: str = "plain",
    prefill_chunk: int | None = None,
    record: Sequence[str] = (),
    record_to: str | Path | None = None,
    on_text: OnText | None = None,
    interventions: Attachable | Sequence[Intervention] = (),
) -> Generation:
    """Continue each row until it writes a stop id or a stop string, or `max_new_tokens`.

    Args:
        tokens: prompts [batch pos], padded on the left if they differ in length (then pass `attention_mask`).
        temperature, top_p, top_k, repetition_penalty, seed: see `workbench.models.sampling.Sampling`.
        stop_ids: ids that end a row; by default the model's own, which are <|return|> and <|call|>.
        stop_strings: texts that end a row once it has written them, wherever tokens begin and end.
        max_thinking_tokens: after so many tokens in the analysis channel the ids that close it and open the final
            channel are written for the model.
        cache: "growing" doubles as it fills; "static" allocates prompt and continuation at once.
        decode: "plain" runs a pass of its own for every token; "buffers" one step over buffers that never move, with a
            static cache; "graph" captures that step in a CUDA graph and replays it (see `workbench.models.fixed`).
        prefill_chunk: at most so many columns of the prompt in one pass; bounds the memory of a long one.
        record: "routing" and names of hook points (full, or short such as "resid_post" for every layer), recorded at
            every token, the last one included. With `record_to` they go to files in that folder as they come.
        on_text: called as on_text(row, text) with each piece of text once it is certain.
        interventions: act on every pass, on the prompt and on what is written.

    Raises ShapeError for values out of range, when the prompt is padded on the right or leaves no room for a new
    token; ConfigError when a text is asked for without a tokenizer, when `decode` cannot go that way, and with the
    numbers when cache, records and the prompt's passes do not fit into what is free now (see `models.room.check_room`);
    HookError for names that do not exist, and for hooks that a graph would not call; InterventionError when a change
    leaves logits that are not finite.
    """
    check_tokens(tokens, model.cfg)
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
    _check(model, tokens, mask, max_new_tokens, cache, prefill_chunk)
    if record_to is not None and not record:
        raise ShapeError("record_to: expected something to record beside it, got none. Name it in record.")
    if on_text is not None and not callable(on_text):
        raise ShapeError(f"on_text: expected a function of (row, text), got {on_text!r}.")
    sampler = Sampler(Sampling(temperature, top_p, top_k, repetition_penalty, seed), tokens.shape[0])
    rows = Rows(model, tokens, mask, stop_ids, stop_strings, max_thinking_tokens, pad_id, on_text)
    recorder = Recorder(model, record, record_to) if record else None
    chunk, growing = prefill_chunk or tokens.shape[1], cache == "growing"
    check_room(model, mask, max_new_tokens, chunk, growing, recorder)
    with ExitStack() as stack:
        stack.enter_context(model.intervene(interventions))
        check_decode(model, decode, cache)
        stack.enter_context(_prompt_lengths(model, mask.sum(1).tolist()))
        # hooks of the caller may keep tensors and take gradients through them later; without any, nobody can
        listened = any(point.listened for point in model.hook_dict.values())
        stack.enter_context(torch.no_grad() if listened else torch.inference_mode())
        stack.enter_context(experts_at_hand(model))
        if recorder is not None:
            stack.enter_context(recorder.listening())
        room = model.new_cache(tokens.shape[0], tokens.shape[1] + max_new_tokens, growing=growing)
        plain = decode == "plain"
        passes = Passes(model, room, recorder) if plain else FixedPasses(model, room, recorder, decode == "graph")
        sampler.see(tokens.cpu(), mask.bool().cpu(), model.cfg.d_vocab, written=False)
        passes.prefill(tokens, attention_mask, chunk)
        for step in range(max_new_tokens):
            logits = passes.logits()  # [batch d_vocab]
            check_finite(logits, some_banned=True)
            chosen = rows.take(sampler.choose(logits))  # [batch]
            ended = not rows.running_any or step + 1 == max_new_tokens
            if ended and recorder is None:
                break
            # a row that ended before this token still takes part, so that the batch keeps its shape, but as padding
            passes.decode(chosen[:, None], rows.last_kept)
            if ended:
                break
            sampler.see(chosen[:, None], rows.last_kept[:, None], model.cfg.d_vocab)
    return rows.generation(recorder.finish() if recorder is not None else Record(), decode)


@contextmanager
def _prompt_lengths(model: Llama, n_prompt: list[int]) -> Iterator[None]:
    """Tell attached interventions where prompts end, which a chunk of a prompt cannot."""
    told = [batch for batch in model.batches if batch.given_n_prompt is None]
    for batch in told:
        batch.given_n_prompt = batch.own(n_prompt)
    try:
        yield
    finally:
        for batch in told:
            batch.given_n_prompt = None


def _check(
    model: Llama, tokens: Tensor, mask: Tensor, max_new_tokens: int, cache: str, prefill_chunk: int | None
) -> None:
    check_mask(mask, (tokens.shape[0], tokens.shape[1]))
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ShapeError(f"max_new_tokens: expected at least 1, a whole number, got {max_new_tokens!r}.")
    if cache not in ("growing", "static"):
        raise ShapeError(f"cache: expected growing or static, got {cache!r}.")
    if prefill_chunk is not None and (type(prefill_chunk) is not int or prefill_chunk < 1):
        raise ShapeError(f"prefill_chunk: expected at least 1, a whole number, or None, got {prefill_chunk!r}.")
    room = model.cfg.n_ctx - tokens.shape[-1]
    if room < 1:
        raise ShapeError(
            f"tokens: expected at most {model.cfg.n_ctx - 1} positions, so that one can be written, got "
            f"{tokens.shape[-1]}. Shorten the prompt."
        )
    if max_new_tokens > room:
        raise ShapeError(
            f"max_new_tokens: expected at most {room} after a prompt of {tokens.shape[-1]} in a context of "
            f"{model.cfg.n_ctx}, got {max_new_tokens}. Shorten either."
        )
    if not bool(mask[:, -1].all()):
        raise ShapeError(
            "attention_mask: expected padding on the left, got a padded last position. Pad prompts on the left."
        )
