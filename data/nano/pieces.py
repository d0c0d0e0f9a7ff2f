"""Learn Unigram pieces from text, the same ones on every machine.

The trainer of the `tokenizers` library gives slightly different scores on every run, so the same algorithm is written
out here in its simplest form: start from all frequent substrings, segment with Viterbi, count, drop the least used.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable

SPACE = "\u2581"
MAX_LENGTH = 14
MIN_COUNT = 5
SHRINK = 0.7  # share of pieces that survives a round
UNSEEN = -20.0  # log probability of a character that is no piece

# Within one unit pieces may form; across units never.  So no piece spans a space or two scripts, and digits, kanji
# numerals and signs stand alone, which lets the models compose numbers instead of remembering them.
UNIT = re.compile(
    rf"[0-9〇一二三四五六七八九十]|{SPACE}?[A-Za-z]+|{SPACE}[+\-×=<>]|[ぁ-ん]+|[ァ-ヴー]+|[々㐀-鿿]+|[^\sA-Za-z]"
)


def count_units(texts: Iterable[str]) -> Counter[str]:
    """How often each unit occurs; a space belongs to the English word or the sign after it."""
    units: Counter[str] = Counter()
    for text in texts:
        units.update(UNIT.findall(SPACE + text.replace(" ", SPACE)))
    return units


def learn_pieces(texts: Iterable[str], n_pieces: int) -> dict[str, float]:
    """At most `n_pieces` pieces of two or more characters, with log probabilities."""
    units = count_units(texts)
    counts: Counter[str] = Counter()
    for unit, n in units.items():
        for start in range(len(unit)):
            for end in range(start + 1, min(len(unit), start + MAX_LENGTH) + 1):
                counts[unit[start:end]] += n
    singles = {piece for piece in counts if len(piece) == 1}
    counts = Counter({piece: n for piece, n in counts.items() if n >= MIN_COUNT or piece in singles})
    while True:
        counts = _recount(units, _scores(counts))
        longer = sorted((piece for piece in counts if len(piece) > 1), key=lambda piece: (-counts[piece], piece))
        if len(longer) <= n_pieces:
            break
        kept = longer[: max(n_pieces, int(SHRINK * len(longer)))]
        counts = Counter({piece: counts[piece] for piece in [*kept, *sorted(singles)]})
    return _scores(counts)


def _scores(counts: Counter[str]) -> dict[str, float]:
    total = math.log(sum(counts.values()))
    return {piece: math.log(n) - total if n else UNSEEN for piece, n in counts.items()}


def _recount(units: Counter[str], scores: dict[str, float]) -> Counter[str]:
    """How often each piece is used when every unit is cut in its most probable way."""
    counts: Counter[str] = Counter()
    for unit, n in units.items():
        for piece in segment(unit, scores):
            counts[piece] += n
    return counts


def segment(unit: str, scores: dict[str, float]) -> list[str]:
    """The most probable way to cut a unit into pieces (Viterbi)."""
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(unit) + 1):
        choices = (
            (best[start][0] + (scores.get(unit[start:end], UNSEEN if end == start + 1 else -math.inf)), start)
            for start in range(max(0, end - MAX_LENGTH), end)
        )
        best.append(max(choices))
    pieces, end = [], len(unit)
    while end:
        start = best[end][1]
        pieces.append(unit[start:end])
        end = start
    return pieces[::-1]
