"""Where an intervention acts: layers, heads, positions, segments, languages, prompt or continuation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from workbench.axes import LANGUAGES, SEGMENTS
from workbench.errors import InterventionError

PHASES = ("prefill", "decode")
FARTHEST = 1 << 31  # beyond any context
Label = Callable[[list[int]], list[str]]  # token ids of one sequence so far -> their segments


@dataclass(frozen=True)
class Where:
    """The tokens and parts that an intervention touches; None is everywhere, an empty tuple nowhere. All must hold.

    layers, heads: numbers; heads at points that have a head axis. positions: counted over tokens, padding left out, so
    they are the same in a padded batch and while decoding; negative ones count from the end of the prompt. segments:
    of axes.SEGMENTS. langs: of the sequence. phase: "prefill" is the prompt, "decode" what was written after it.
    """

    layers: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    segments: tuple[str, ...] | None = None
    langs: tuple[str, ...] | None = None
    phase: str | None = None

    def __post_init__(self) -> None:
        for name, kind in (("layers", int), ("positions", int), ("heads", int), ("segments", str), ("langs", str)):
            object.__setattr__(self, name, _tuple_of(name, getattr(self, name), kind))
        for name, known in (("segments", SEGMENTS), ("langs", LANGUAGES)):
            unknown = [value for value in getattr(self, name) or () if value not in known]
            if unknown:
                raise InterventionError(f"{name}: expected some of {', '.join(known)}, got {', '.join(unknown)}.")
        if far := [place for place in self.positions or () if not -FARTHEST <= place < FARTHEST]:
            raise InterventionError(f"positions: expected numbers from -{FARTHEST} to {FARTHEST - 1}, got {far[0]}.")
        if self.phase not in (None, *PHASES):
            raise InterventionError(f"phase: expected prefill, decode or none, got {self.phase!r}.")

    def meets(self, other: Where) -> bool:
        """Whether some token may lie in both, layers aside; positions from the start and the end may coincide."""
        pairs = [(self.segments, other.segments), (self.langs, other.langs)]
        if _one_sided(self.positions) and _one_sided(other.positions) and _from_end(self) == _from_end(other):
            pairs.append((self.positions, other.positions))  # type: ignore[arg-type]
        apart = any(a is not None and b is not None and not set(a) & set(b) for a, b in pairs)
        nowhere = any(() in (w.positions, w.segments, w.langs) for w in (self, other))
        return not apart and not nowhere and (None in (self.phase, other.phase) or self.phase == other.phase)

    def covers(self, other: Where) -> bool:
        """Whether every token of `other` lies here too, layers aside."""
        for name in ("positions", "segments", "langs"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None and (theirs is None or not set(theirs) <= set(mine)):
                return False
        return self.phase in (None, other.phase)

    def to_json(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}


@dataclass
class _Rows:
    """What is known of sequences that run: how long each prompt is, and their tokens so far if seen from the start."""

    n_prompt: Tensor  # int64 [batch]
    ids: list[list[int]] | None


class Batch:
    """The sequences that are running: which token each column of the present pass holds, and what is known of it."""

    def __init__(
        self,
        items: Sequence[Any],
        label: Label | None = None,
        langs: Sequence[str] | None = None,
        n_prompt: Sequence[int] | None = None,
        row: tuple[int, int] | None = None,
    ) -> None:
        self.told: list[list[int]] | None = None  # the sequences that run, where a pass does not say; see `told`
        self.copies = 1  # of those sequences in the batch that runs, one after another
        self.items = items  # the interventions that are attached with it
        self.edits: list[Any] = []  # what they were lowered to
        self.label, self.langs, self.given_n_prompt = label, langs, n_prompt
        self.row = row  # (number, of how many): of all that run this is told of one row alone; None: of all
        self.positions = self.valid = torch.empty(0)
        self._rows = _Rows(torch.empty(0), [])
        # several caches may take turns in one block, and each continues its own sequences
        self._by_cache: WeakKeyDictionary[Any, _Rows] = WeakKeyDictionary()
        self._tokens: Tensor | None = None
        self._segments: list[list[str]] | None = None
        self._masks: dict[Where, Tensor | None] = {}
        self._constants: dict[tuple[Any, ...], Tensor] = {}

    @property
    def n_prompt(self) -> Tensor:  # int64 [batch]
        return self._rows.n_prompt

    def begin(
        self, tokens: Tensor | None, positions: Tensor, valid: Tensor | None, continues: bool, cache: Any = None
    ) -> None:
        """A forward pass starts: positions [batch pos], valid [batch pos] or None when nothing is padded.

        continues: the sequences are those that `cache` holds, and not new ones.
        """
        self._masks.clear()
        self._segments = None
        self.copies = positions.shape[0] // len(self.told) if self.told else 1
        if self.row is not None and self.row[1] * self.copies != positions.shape[0]:
            raise InterventionError(f"PerRow: expected {self.row[1]} rows in the batch, got {positions.shape[0]}.")
        if self.row is not None and cache is not None:
            cache = cache.of_row(self.row[0])  # sequences that come and go have caches of their own
        tokens = None if tokens is None else self.own(tokens)
        self.positions = self.own(positions)  # [batch pos]
        self.valid = torch.ones_like(self.positions, dtype=torch.bool) if valid is None else self.own(valid)
        self.all_valid = valid is None
        if self.told is not None:
            self._rows = _Rows(self._prompt_lengths(self.positions.shape[0]), self.own(self.told) * self.copies)
            return
        self._rows = self._rows_of(cache if continues else None)
        if cache is not None:
            self._by_cache[cache] = self._rows
        self._tokens = tokens
        if self.label is not None and tokens is not None:
            self._note(tokens)

    def own(self, of_all: Any) -> Any:
        """What is this batch's own of a tensor [batch ...] or a list with an entry for each row that runs."""
        return of_all if self.row is None else of_all[self.row[0] :: self.row[1]]

    def _rows_of(self, cache: Any) -> _Rows:
        """What is known of the running sequences. When the block began after their prompt, that is all they held."""
        if cache is None:
            return _Rows(self._prompt_lengths(self.positions.shape[0]), [[] for _ in self.positions])
        if cache not in self._by_cache:
            held = self._held() if self.given_n_prompt is None else self._prompt_lengths(self.positions.shape[0])
            return _Rows(held, None)
        return self._by_cache[cache]

    def _held(self) -> Tensor:  # int64 [batch], tokens before this pass
        return self.positions[:, 0] + 1 - self.valid[:, 0].long()

    def _note(self, tokens: Tensor) -> None:
        """Add this pass's tokens to the sequences, in place of those of a pass that failed at the same positions."""
        if self._rows.ids is None:
            return
        for row, ids, real, start in zip(
            self._rows.ids, tokens.tolist(), self.valid.tolist(), self._held().tolist(), strict=True
        ):
            del row[start:]
            row.extend(token for token, kept in zip(ids, real, strict=True) if kept)

    def mask(self, where: Where) -> Tensor | None:
        """bool [batch pos], True where `where` holds at a token; None when that is everywhere."""
        if where not in self._masks:
            self._masks[where] = self._compute(where)
        return self._masks[where]

    def _compute(self, where: Where) -> Tensor | None:
        limits = (where.positions, where.segments, where.langs, where.phase)
        if self.all_valid and all(limit is None for limit in limits):
            return None
        mask = self.valid.clone()  # [batch pos]
        if where.positions is not None:
            wanted = self._constant(where.positions, torch.long)
            absolute = torch.where(wanted < 0, wanted + self.n_prompt[:, None], wanted)  # [batch wanted]
            mask &= (self.positions[..., None] == absolute[:, None, :]).any(-1)
        if where.phase is not None:
            mask &= (self.positions >= self.n_prompt[:, None]) == (where.phase == "decode")
        if where.langs is not None:
            mask &= self._constant(self._in_langs(where.langs), torch.bool)[:, None]
        if where.segments is not None:
            mask &= self._in_segments(where.segments)
        return mask

    def _constant(self, values: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Where the sequences run, and sent there once: a pass that a graph is to capture may send nothing."""
        key = (*values, dtype, self.valid.device)
        if key not in self._constants:
            with torch.inference_mode(False):
                self._constants[key] = torch.tensor(values, dtype=dtype, device=self.valid.device)
        return self._constants[key]

    def _prompt_lengths(self, batch: int) -> Tensor:  # int64 [batch]
        given = self.given_n_prompt
        if given is None and self.told is not None:
            given = [len(ids) for ids in self.own(self.told)]
        if given is None:
            return self.positions.masked_fill(~self.valid, -1).amax(1) + 1
        if len(given) * self.copies != batch:
            raise InterventionError(f"n_prompt: expected one for each of {batch} rows, got {len(given)}.")
        return torch.tensor(list(given) * self.copies, device=self.valid.device)

    def _in_langs(self, langs: tuple[str, ...]) -> list[bool]:
        batch = self.valid.shape[0] // self.copies
        if self.langs is None or len(self.langs) != batch:
            got = "none" if self.langs is None else str(len(self.langs))
            raise InterventionError(
                f"langs: expected one for each of {batch} rows, got {got}. Pass Interventions(..., langs=[...])."
            )
        return [lang in langs for lang in self.langs] * self.copies

    def _in_segments(self, segments: tuple[str, ...]) -> Tensor:  # bool [batch pos]
        if self.label is None or (self._tokens is None and self.told is None):
            raise InterventionError(
                "segments: expected token ids and a way to label them, got none. Pass Interventions(..., label=...), "
                "for instance partial(label_tokens, tokenizer=model.tokenizer), and run from tokens."
            )
        if self._rows.ids is None:
            raise InterventionError(
                "segments: expected to see a sequence from its first token, got a cache that was filled outside the "
                "intervene block. Fill it inside."
            )
        if self._segments is None:
            self._segments = [self.label(row) for row in self._rows.ids]
        found = torch.zeros_like(self.valid, device="cpu")
        places = self.positions.cpu()
        for row, (labels, real) in enumerate(zip(self._segments, self.valid.cpu(), strict=True)):
            found[row, real] = torch.tensor([labels[pos] in segments for pos in places[row, real]]).bool()
        return found.to(self.valid.device)


@contextmanager
def told(model: Any, tokens: Tensor, mask: Tensor | None) -> Iterator[None]:
    """Inside, every pass is over these sequences [row pos], or over several copies of them, copy after copy.

    For experiments, which start in the middle of a model and repeat rows: a pass from the residual stream does not say
    whose it is. What interventions know of rows (languages, prompts, recordings, PerRow) they know of each copy's.
    """
    kept = [True] * tokens.shape[1]
    real = [kept] * tokens.shape[0] if mask is None else mask.bool().tolist()
    sequences = [
        [token for token, kept in zip(row, rows, strict=True) if kept]
        for row, rows in zip(tokens.tolist(), real, strict=True)
    ]
    before = [(batch, batch.told) for batch in model.batches]
    for batch in model.batches:
        batch.told = sequences
    try:
        yield
    finally:
        for batch, sequences_before in before:
            batch.told = sequences_before


def _one_sided(positions: tuple[int, ...] | None) -> bool:
    return bool(positions) and len({position < 0 for position in positions or ()}) == 1


def _from_end(where: Where) -> bool:
    return bool(where.positions) and where.positions is not None and where.positions[0] < 0


def _tuple_of(name: str, values: Any, kind: type) -> tuple[Any, ...] | None:
    if values is None:
        return None
    listed = (values,) if isinstance(values, kind) else values
    if isinstance(listed, str) or not isinstance(listed, Sequence | range):
        raise InterventionError(f"{name}: expected a list, got {values!r}.")
    for value in listed:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InterventionError(f"{name}: expected {kind.__name__} values, got {value!r}.")
    return tuple(listed)
