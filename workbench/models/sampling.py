"""Choosing the next token: greedy or sampled, each row from its own stream of random numbers."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workbench.errors import InterventionError, ShapeError

MOST_BIAS = 100.0  # what is added to a logit, in OpenAI's API too; far more would be infinite in float32
MOST_PENALTY = 100.0  # and its inverse: logits are multiplied by it


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits, in the order in which it happens.

    repetition_penalty: logits of ids that a row already holds are divided by it where positive and multiplied where
    negative (1909.05858); 1 is off, from 0.01 to 100. frequency_penalty, presence_penalty: taken off the logit of an
    id that the row wrote itself, once for each time and once in all; 0 is off. logit_bias: (id, what is added to its
    logit), in effect last. These three lie within ±100. temperature: 0 takes the most probable token, and what
    follows has no effect. top_k keeps the k largest logits, 0 all; ties with the k-th stay. top_p keeps the most
    probable tokens until they hold that much probability (1904.09751), 1 all. seed: one number for all rows, each of
    which gets a stream of its own (`row_seeds`), or one for each row; a row draws the same numbers whatever shares
    its batch, on every device.
    Raises ShapeError for values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | Sequence[int] | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        _check_number(
            "temperature", self.temperature, 0 <= _number(self.temperature) < math.inf, "0 or a positive number"
        )
        _check_number("top_p", self.top_p, 0 < _number(self.top_p) <= 1, "a number above 0, at most 1")
        _check_number(
            "repetition_penalty",
            self.repetition_penalty,
            1 / MOST_PENALTY <= _number(self.repetition_penalty) <= MOST_PENALTY,
            f"a positive number from {1 / MOST_PENALTY} to {MOST_PENALTY:.0f}",
        )
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            _check_number(name, value, abs(_number(value)) <= MOST_BIAS, f"a number within ±{MOST_BIAS:.0f}")
        for token_id, bias in self.logit_bias:
            fits = type(token_id) is int and token_id >= 0 and abs(_number(bias)) <= MOST_BIAS
            _check_number("logit_bias", (token_id, bias), fits, f"ids with numbers within ±{MOST_BIAS:.0f}")
        if type(self.top_k) is not int or self.top_k < 0:
            raise ShapeError(f"top_k: expected a whole number from 0, got {self.top_k!r}.")


@dataclass
class Sampler:
    """Chooses for a batch: `Sampler(sampling, batch).choose(logits)`, and `see` for ids that count as repetition."""

    sampling: Sampling
    batch: int
    _streams: list[random.Random] = field(init=False)
    _seen: Tensor | None = None  # bool [batch d_vocab]
    _counts: Tensor | None = None  # float32 [batch d_vocab], how often each id was written

    def __post_init__(self) -> None:
        self._streams = [random.Random(seed) for seed in _seeds(self.sampling.seed, self.batch)]

    def see(self, tokens: Tensor, valid: Tensor, d_vocab: int, written: bool = True) -> None:
        """Count ids [batch pos] where `valid` [batch pos], a prompt's with `written=False`; only penalties ask."""
        counts = written and (self.sampling.frequency_penalty or self.sampling.presence_penalty)
        if self.sampling.repetition_penalty == 1 and not counts:
            return
        rows = torch.arange(self.batch)[:, None].expand(tokens.shape)
        places = rows[valid], tokens[valid].long()
        if self.sampling.repetition_penalty != 1:
            if self._seen is None:
                self._seen = torch.zeros(self.batch, d_vocab, dtype=torch.bool)
            self._seen[places] = True
        if counts:
            if self._counts is None:
                self._counts = torch.zeros(self.batch, d_vocab)
            self._counts.index_put_(places, torch.ones(len(places[0])), accumulate=True)

    def choose(self, logits: Tensor) -> Tensor:  # float32 [batch d_vocab] on the CPU -> int64 [batch]
        if self._seen is not None:
            penalty = self.sampling.repetition_penalty
            logits = torch.where(self._seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if self._counts is not None:
            once = self.sampling.presence_penalty * (self._counts > 0)
            logits = logits - self.sampling.frequency_penalty * self._counts - once
        if self.sampling.logit_bias:
            ids, biases = zip(*self.sampling.logit_bias, strict=True)
            logits = logits.index_add(-1, torch.tensor(ids), torch.tensor(biases).expand(len(logits), -1))
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        draws = torch.tensor([stream.random() for stream in self._streams], dtype=torch.float64)  # [batch], in [0, 1)
        return _inverse(probabilities(logits, self.sampling), draws)


def check_finite(logits: Tensor, some_banned: bool = False) -> None:  # [... d_vocab]
    """Raises InterventionError for NaN and infinity, from which no token can be chosen and no probability told.

    With `some_banned` a token may have -inf, which is never chosen, as long as another has not.
    """
    if not bool(torch.isfinite(logits.amax(-1) if some_banned else logits).all()):  # the largest of a NaN is NaN
        raise InterventionError(
            "logits: expected finite numbers, got NaN or infinity. Use smaller vectors and factors in interventions, "
            "or a wider dtype."
        )


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:  # [batch d_vocab] -> float64 [batch d_vocab]
    """What is sampled from at temperature > 0: zeros where top_k or top_p leave a token out, rows sum to 1."""
    wide = logits.double()
    scaled = (wide - wide.max(-1, keepdim=True).values) / sampling.temperature  # a temperature next to 0 leaves a 0
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probs = scaled.softmax(-1)
    if sampling.top_p < 1:
        ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # probability of what is more probable
        probs = torch.zeros_like(probs).scatter_(-1, ids, ordered.masked_fill(before >= sampling.top_p, 0.0))
    return probs / probs.sum(-1, keepdim=True)


def row_seeds(seed: int, batch: int) -> list[int]:
    """The seeds of the rows of a batch that was given one: `seed=[row_seeds(7, 32)[5]]` repeats row 5 alone.

    Hashed, so that neighbouring seeds share no row.
    """
    digests = [hashlib.sha256(f"{seed} {row}".encode()).digest() for row in range(batch)]
    return [int.from_bytes(digest[:8], "big") >> 1 for digest in digests]


def _inverse(probs: Tensor, draws: Tensor) -> Tensor:
    """The token at which the running sum of probabilities passes the draw."""
    total = probs.cumsum(-1)
    found = torch.searchsorted(total, (draws * total[:, -1])[:, None], right=True)[:, 0]
    # rounding may leave the last sum on a token without probability
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).long().argmax(-1)
    return found.minimum(last)


def _seeds(seed: int | Sequence[int] | None, batch: int) -> Sequence[int | None]:
    if seed is None:
        return [None] * batch
    if isinstance(seed, int):
        return row_seeds(_checked(seed), batch)
    if not isinstance(seed, list | tuple) or len(seed) != batch:
        raise ShapeError(f"seed: expected a whole number or one for each of {batch} rows, got {seed!r}.")
    return [_checked(one) for one in seed]


def _checked(seed: object) -> int:
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ShapeError(f"seed: expected a whole number from 0 to 2**63 - 1, got {seed!r}.")
    return seed


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf


def _check_number(name: str, value: object, fits: bool, expected: str) -> None:
    if not fits:
        raise ShapeError(f"{name}: expected {expected}, got {value!r}.")
