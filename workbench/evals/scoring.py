"""What tasks ask of a model: how probable a continuation is, and what the model writes after a prompt.

Token ids in, numbers and token ids out. Sequences are sorted by length so that a batch holds little padding; results
come back in the order they were asked for, and each is what the sequence alone would give, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from workbench.capture import check_room, pad, suitable_threads
from workbench.chat import label_tokens
from workbench.interventions import Intervention, Interventions
from workbench.models import Generation, Llama
from workbench.models.sampling import check_finite

MAX_LOGITS = 1 << 26  # values at once: 256 MB
Done = Callable[[int], object]  # told how many sequences were finished


@dataclass(frozen=True)
class Pair:
    """A context and what follows it, as token ids; `lang` is the item's, for interventions limited by language."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    lang: str | None = None

    @property
    def read(self) -> tuple[int, ...]:
        """What the model reads: all but the last token, which is only predicted."""
        return self.context + self.continuation[:-1]


@dataclass(frozen=True)
class Changes:
    """Interventions that act on every sequence, with what they may ask about it.

    A context is the prompt and a continuation what is written after it, so "prefill", "decode" and positions from the
    end of the prompt mean the same whether the continuation is scored or generated.
    """

    items: tuple[Intervention, ...] = field(default_factory=tuple)

    def on(self, model: Llama, langs: Sequence[str | None], n_prompt: Sequence[int] | None = None) -> Interventions:
        """For the rows of one batch. An item without a language is "mixed"."""
        asks = any(item.where.segments is not None for item in self.items)  # labels cost a look at every token
        label = partial(label_tokens, tokenizer=model.tokenizer) if asks and model.tokenizer is not None else None
        return Interventions(self.items, label, [lang or "mixed" for lang in langs], n_prompt)


@torch.inference_mode()
def score(
    model: Llama, pairs: Sequence[Pair], changes: Changes | None = None, batch_size: int = 32, done: Done | None = None
) -> list[tuple[float, bool]]:
    """For each pair the log-probability of the continuation, in nats, and whether each of its tokens is the most
    probable one after those before it. Pairs that differ in their last token alone share a pass. Raises
    InterventionError when a change leaves logits that are not finite.
    """
    changes = changes or Changes()
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, pair in enumerate(pairs):
        groups.setdefault((pair.read, len(pair.context), pair.lang), []).append(place)
    ordered = sorted(groups.values(), key=lambda places: -len(pairs[places[0]].read))
    check_room(model, [pairs[places[0]].read for places in ordered], 0)
    found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    with suitable_threads(model):
        for start in range(0, len(ordered), batch_size):
            chunk = ordered[start : start + batch_size]
            for places, log_probs in zip(chunk, _predict(model, [pairs[p[0]] for p in chunk], changes), strict=True):
                for place in places:
                    found[place] = _read(log_probs, pairs[place].continuation)
            if done is not None:
                done(sum(map(len, chunk)))
    return found


def _predict(model: Llama, firsts: Sequence[Pair], changes: Changes) -> Iterator[Tensor]:
    """For each pair the log-probabilities at its continuation, float32 [token d_vocab]."""
    tokens, mask = pad([pair.read for pair in firsts], left=False)
    n_prompt = [len(pair.context) for pair in firsts]
    with model.intervene(changes.on(model, [pair.lang for pair in firsts], n_prompt)):
        resid = model(tokens.to(model.device), mask.to(model.device), stop_at_layer=model.cfg.n_layers)
        normalized = model.ln_final(resid)  # [batch pos d_model]; its points may be intervened on too
    for row, pair in enumerate(firsts):
        scored = normalized[row, len(pair.context) - 1 : len(pair.read)]  # [token d_model]
        parts = scored.split(max(1, MAX_LOGITS // model.cfg.d_vocab))
        yield torch.cat([_log_probs(model, part) for part in parts])


def _log_probs(model: Llama, normalized: Tensor) -> Tensor:  # [token d_model] -> float32 [token d_vocab] on the CPU
    logits = model.unembed(normalized).float()
    check_finite(logits, some_banned=True)
    return logits.log_softmax(-1).cpu()


def _read(log_probs: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    wanted = torch.tensor(continuation)[:, None]  # [token 1]
    greedy = bool((log_probs.argmax(-1, keepdim=True) == wanted).all())
    return float(log_probs.gather(-1, wanted).sum()), greedy


@dataclass(frozen=True)
class Writing:
    """How continuations are written; the arguments of `workbench.models.generate.generate` of the same names.

    seed: one for every prompt, which draws as if it were asked alone, or one for each.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | Sequence[int] | None = None
    stop_strings: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None


def write(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    how: Writing,
    changes: Changes | None = None,
    langs: Sequence[str | None] | None = None,
    batch_size: int = 32,
    done: Done | None = None,
) -> list[list[int]]:
    """The ids written after each prompt, a stop id included, whatever shares its batch."""
    changes = changes or Changes()
    check_room(model, prompts, how.max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    found: list[list[int]] = [[] for _ in prompts]

    def seed_of(place: int) -> int:
        assert how.seed is not None
        return how.seed if isinstance(how.seed, int) else how.seed[place]

    with suitable_threads(model):
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            interventions = changes.on(model, [langs[place] if langs else None for place in chunk])
            seeds = None if how.seed is None else [seed_of(place) for place in chunk]
            written = _write(model, [prompts[place] for place in chunk], how, seeds, interventions)
            for place, ids in zip(chunk, written.continuations(), strict=True):
                found[place] = ids
            if done is not None:
                done(len(chunk))
    return found


def _write(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    how: Writing,
    seeds: list[int] | None,
    interventions: Interventions,
) -> Generation:
    tokens, mask = pad(prompts, left=True)
    result = model.generate(
        tokens.to(model.device),
        mask.to(model.device),
        max_new_tokens=how.max_new_tokens,
        temperature=how.temperature,
        top_p=how.top_p,
        top_k=how.top_k,
        repetition_penalty=how.repetition_penalty,
        seed=seeds,
        stop_strings=how.stop_strings,
        stop_ids=how.stop_ids,
        interventions=interventions,
    )
    assert isinstance(result, Generation)
    return result
