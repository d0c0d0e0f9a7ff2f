"""Where in the English prompt is this place of the Japanese one? A monotone map of positions, with its gaps explicit.

Patching between languages needs to know which position of one prompt an activation of the other belongs to. Four kinds
of places correspond, in this order of authority; everything else is unaligned and says so:

  given    the last tokens of two spans that the researcher names ("フランス", "France")
  control  equal tokens of the Harmony scaffolding, in order
  shared   tokens of one text in both prompts, such as numbers, names in Latin letters and code, between two such places
  end      the last token of what stands between two such places, where a causal model has read all of it

The map is strictly increasing in both prompts: word order differs between the languages, and a crossing would pair a
position that has read the subject with one that has not.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise

import polars as pl

from workbench.chat.parse import label_tokens
from workbench.errors import ShapeError
from workbench.io.tokens import Tokenizer

KINDS = ("given", "control", "shared", "end")


@dataclass(frozen=True)
class Match:
    """Position `first` of one prompt corresponds to position `second` of the other."""

    first: int
    second: int
    kind: str
    label: str


@dataclass(frozen=True)
class Alignment:
    """The map between two token sequences: `matches` increase in both; positions in none are unaligned.

    `label` tells matches of a kind apart in a way that other prompts of the same form share: "given 0", "control 7",
    "end user 0"; of shared tokens it holds the text.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    matches: tuple[Match, ...]
    tokens: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def unaligned(self) -> tuple[list[int], list[int]]:
        """The positions of either prompt that correspond to nothing."""
        firsts, seconds = {match.first for match in self.matches}, {match.second for match in self.matches}
        return (
            [pos for pos in range(len(self.first)) if pos not in firsts],
            [pos for pos in range(len(self.second)) if pos not in seconds],
        )

    def frame(self) -> pl.DataFrame:
        """Every position once: first, first_token, second, second_token, kind, label; null where there is none."""
        lone_first, lone_second = self.unaligned
        rows: list[tuple[int | None, int | None, str, str | None]]
        rows = [(m.first, m.second, m.kind, m.label) for m in self.matches]
        rows += [(pos, None, "unaligned", None) for pos in lone_first]
        rows += [(None, pos, "unaligned", None) for pos in lone_second]
        shown = [
            (a, None if a is None else self.tokens[0][a], b, None if b is None else self.tokens[1][b], kind, label)
            for a, b, kind, label in rows
        ]
        schema = {"first": pl.Int64, "first_token": pl.String, "second": pl.Int64, "second_token": pl.String,
                  "kind": pl.String, "label": pl.String}  # fmt: skip
        return pl.DataFrame(shown, schema=schema, orient="row")


def align(
    first: Sequence[int], second: Sequence[int], tokenizer: Tokenizer, given: Sequence[tuple[str, str]] = ()
) -> Alignment:
    """Align two token sequences that say the same, usually a Japanese and an English rendering of one conversation.

    `given` are pairs of texts, one from each prompt, whose last tokens shall correspond. Raises ShapeError when such a
    text is missing or occurs twice, and when the places given contradict each other or the scaffolding (word order may
    make that so: then name fewer).
    """
    texts = tokenizer.to_str_tokens(first), tokenizer.to_str_tokens(second)
    labels = label_tokens(first, tokenizer), label_tokens(second, tokenizer)
    fixed = [
        Match(_last_token(texts[0], one), _last_token(texts[1], other), "given", f"given {number}")
        for number, (one, other) in enumerate(given)
    ]
    fixed = _monotone(fixed + _control(first, second, labels))
    matches = list(fixed)
    ends = [Match(-1, -1, "", ""), *fixed, Match(len(first), len(second), "", "")]
    counts: dict[str, int] = {}
    for left, right in pairwise(ends):
        matches += _between(left, right, texts, labels, counts)
    ordered = sorted(matches, key=lambda match: match.first)
    return Alignment(tuple(first), tuple(second), tuple(ordered), (tuple(texts[0]), tuple(texts[1])))


def common_positions(alignments: Sequence[Alignment]) -> dict[str, list[tuple[int, int]]]:
    """Places that all alignments have, by label: for each the (first, second) position in every pair of prompts.

    This is the `positions` of `Pairs`. Shared tokens are left out, since each prompt has its own.
    """
    places = [{m.label: (m.first, m.second) for m in one.matches if m.kind != "shared"} for one in alignments]
    if not places:
        return {}
    return {label: [one[label] for one in places] for label in places[0] if all(label in one for one in places)}


def _control(first: Sequence[int], second: Sequence[int], labels: tuple[list[str], list[str]]) -> list[Match]:
    """Equal scaffolding tokens in the longest runs that keep their order."""
    scaffold = [[pos for pos, label in enumerate(part) if label in ("control", "bos")] for part in labels]
    ids = [first[pos] for pos in scaffold[0]], [second[pos] for pos in scaffold[1]]
    found = []
    for block in SequenceMatcher(None, ids[0], ids[1], autojunk=False).get_matching_blocks():
        for step in range(block.size):
            number = block.a + step
            found.append(Match(scaffold[0][number], scaffold[1][block.b + step], "control", f"control {number}"))
    return found


def _monotone(matches: list[Match]) -> list[Match]:
    ordered = sorted(matches, key=lambda match: (match.first, match.second))
    for one, next_one in pairwise(ordered):
        if one.first >= next_one.first or one.second >= next_one.second:
            raise ShapeError(
                f"given: expected places in the same order in both prompts, got {one.label!r} and {next_one.label!r} "
                "crossing. Name fewer places."
            )
    return ordered


def _between(
    left: Match,
    right: Match,
    texts: tuple[list[str], list[str]],
    labels: tuple[list[str], list[str]],
    counts: dict[str, int],
) -> Iterator[Match]:
    """Shared tokens strictly between two matches, and the last token of each side unless it is matched already."""
    spans = range(left.first + 1, right.first), range(left.second + 1, right.second)
    if not spans[0] or not spans[1]:
        return
    keys = [
        [_shared_key(text[pos], (side, pos)) for pos in span]
        for side, (text, span) in enumerate(zip(texts, spans, strict=True))
    ]
    last = (left.first, left.second)
    for block in SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_matching_blocks():
        for step in range(block.size):
            last = (spans[0][block.a + step], spans[1][block.b + step])
            yield Match(*last, "shared", f"shared {texts[0][last[0]].strip()}")
    end = spans[0][-1], spans[1][-1]
    if last[0] < end[0] and last[1] < end[1]:
        segment = labels[0][end[0]]
        number = counts[segment] = counts.get(segment, -1) + 1
        yield Match(*end, "end", f"end {segment} {number}")


def _shared_key(text: str, place: tuple[int, int]) -> Hashable:
    """What must be equal in both prompts: text without width, case and spaces; what is no word equals nothing."""
    key = unicodedata.normalize("NFKC", text).casefold().strip()
    return key if any(character.isalnum() and character.isascii() for character in key) else place


def _last_token(texts: Sequence[str], wanted: str) -> int:
    """The token that holds the last character of `wanted`."""
    whole = "".join(texts)
    start = whole.find(wanted)
    if not wanted or start < 0 or whole.find(wanted, start + 1) >= 0:
        found = "an empty text" if not wanted else "none" if start < 0 else "several"
        raise ShapeError(f"given: expected {wanted!r} once in the prompt, got {found}. Name a text that is there once.")
    stop, seen = start + len(wanted), 0
    for pos, text in enumerate(texts):
        seen += len(text)
        if seen >= stop:
            return pos
    raise AssertionError("a text that was found ends in some token")
