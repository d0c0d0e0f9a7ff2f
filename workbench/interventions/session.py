"""What is attached to a model while it runs: one ordered list for all rows of a batch, or one for each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import InterventionError
from workbench.interventions.base import Intervention
from workbench.interventions.files import from_json, load_interventions
from workbench.interventions.lowering import attached, check_together
from workbench.interventions.where import Batch, Label


class Attachable:
    """What `model(..., interventions=)`, `model.generate` and `model.intervene` take besides a plain list."""

    def batches(self) -> list[Batch]:
        """Who is to be told of the sequences that run, and acts on them; without items nobody."""
        raise InterventionError(f"interventions: expected Interventions or PerRow, got {type(self).__name__}.")

    def check(self, model: Any) -> None:
        """Raises InterventionError unless every item fits the model and can act beside those attached already."""
        check_together(self.batches(), model)

    @contextmanager
    def attach(self, model: Any) -> Iterator[None]:
        """Act on every pass inside the block, those of an outer block first; hooks of any kind see the outcome.

        Nothing stays attached: outside the block the model computes what it did before, bit for bit.
        """
        batches = self.batches()
        check_together(batches, model)
        with attached(model, batches):
            yield


@dataclass(frozen=True, eq=False)
class Interventions(Attachable):
    """Interventions in the order in which they act, and what is known of the sequences they meet.

    label: token ids of a sequence -> the segment of each; needed to limit by segment. langs: the language of each row;
    needed to limit by language. n_prompt: how many tokens of each row are prompt; by default all of the first pass.
    Only the items are stored in files.
    """

    items: Sequence[Intervention]
    label: Label | None = None
    langs: Sequence[str] | None = None
    n_prompt: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.items, Intervention):
            object.__setattr__(self, "items", (self.items,))
        if not isinstance(self.items, Sequence):
            raise InterventionError(f"interventions: expected a list of them, got {type(self.items).__name__}.")
        if isinstance(self.items, str):
            raise InterventionError(f"interventions: expected values, got {self.items!r}. Use Interventions.load.")
        for item in self.items:
            if not isinstance(item, Intervention):
                raise InterventionError(f"interventions: expected values such as KnockOut(...), got {item!r}.")
        object.__setattr__(self, "items", tuple(self.items))

    @classmethod
    def load(cls, path: str | Path, **known: Any) -> Interventions:
        """Those of a file that `save_interventions` wrote, or a person; `known` are the other fields of this class.

        Raises InterventionError naming the file, the entry and the field that is wrong.
        """
        return cls(load_interventions(path), **known)

    @classmethod
    def from_json(cls, value: Any, **known: Any) -> Interventions:
        """Those of a document {"format": 1, "interventions": [...]}, parsed or as text; `known` as in `load`.

        Raises InterventionError naming the entry and the field that is wrong.
        """
        return cls(from_json(value), **known)

    def batches(self) -> list[Batch]:
        return [Batch(self.items, self.label, self.langs, self.n_prompt)] if self.items else []


@dataclass(frozen=True, eq=False)
class PerRow(Attachable):
    """Each row of a batch with interventions of its own, or none, as if every row ran alone.

    rows: for each row a list of interventions, or an `Interventions`, or None. An item sees its own row and no other,
    so that a recording has one row and SwapRouting nothing to swap. label, langs, n_prompt: as in `Interventions`, for
    rows that do not bring their own (whose langs and n_prompt then have one entry). Raises InterventionError when the
    batch that runs has another number of rows.
    """

    rows: Sequence[Interventions | Intervention | Sequence[Intervention] | None]
    label: Label | None = None
    langs: Sequence[str | None] | None = None
    n_prompt: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rows, Sequence) or not self.rows:
            raise InterventionError(f"PerRow: expected a list with an entry for each row, got {self.rows!r}.")
        for name, given in (("langs", self.langs), ("n_prompt", self.n_prompt)):
            if given is not None and len(given) != len(self.rows):
                raise InterventionError(f"{name}: expected one for each of {len(self.rows)} rows, got {len(given)}.")
        object.__setattr__(self, "rows", tuple(self._row(number) for number in range(len(self.rows))))

    def batches(self) -> list[Batch]:
        n_rows = len(self.rows)
        given = [(number, row) for number, row in enumerate(self.rows) if isinstance(row, Interventions) and row.items]
        return [Batch(row.items, row.label, row.langs, row.n_prompt, (number, n_rows)) for number, row in given]

    def _row(self, number: int) -> Interventions:
        given = self.rows[number]
        try:
            own = as_interventions(() if given is None else given)
        except InterventionError as error:
            raise InterventionError(f"row {number}: {error}") from None
        if not isinstance(own, Interventions):
            raise InterventionError(f"row {number}: expected a list of interventions, got {type(own).__name__}.")
        lang = None if self.langs is None else self.langs[number]
        n_prompt = None if self.n_prompt is None else self.n_prompt[number]
        return Interventions(
            own.items,
            own.label or self.label,
            own.langs or (None if lang is None else [lang]),
            own.n_prompt or (None if n_prompt is None else [n_prompt]),
        )


def as_interventions(given: Attachable | Intervention | Sequence[Intervention]) -> Attachable:
    return given if isinstance(given, Attachable) else Interventions(given)  # type: ignore[arg-type]
