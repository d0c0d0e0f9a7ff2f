"""What every other module here builds on: one thing said in both languages, and the rule that holds things out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from random import Random

LANGUAGES = ("ja", "en")
EFFORTS = ("low", "medium", "high")
HELD_OUT_PERCENT = 10


@dataclass(frozen=True)
class Problem:
    """One question with its worked solution; every dict has the keys "ja" and "en" and says the same in both.

    Attributes:
        task: name of the kind of problem, e.g. "addition".
        key: language-free identity, e.g. "27+15" or "capital:France".
        held_out: True where the operands (not the wording) are kept from all training text.
        questions: ways to ask.  The index of a phrasing is the same in both languages.
        hint: all that low effort thinks.
        steps: what medium effort thinks, in order.
        check: what high effort adds after the steps.
        answer: the final answer as one sentence.
        value: the bare answer.
    """

    task: str
    key: str
    held_out: bool
    questions: dict[str, tuple[str, ...]]
    hint: dict[str, str]
    steps: dict[str, tuple[str, ...]]
    check: dict[str, tuple[str, ...]]
    answer: dict[str, str]
    value: dict[str, str]


def seeded(*parts: object) -> Random:
    """A random generator that depends on the parts alone, so that document n never depends on document n-1."""
    return Random("/".join(map(str, parts)))


def is_held_out(*parts: object) -> bool:
    """Whether the thing named by the parts belongs to the held-out tenth.  A hash decides, so no list is kept."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def pair_held_out(a: int, b: int) -> bool:
    """Whether the number family {a, b, a+b} is held out: a+b, b+a, (a+b)-a and (a+b)-b go together.

    Families of two one-digit numbers are never held out: they are the table that longer sums are worked out with.
    """
    low, high = sorted((a, b))
    return high >= 10 and is_held_out("family", low, high)


def join(lang: str, sentences: list[str] | tuple[str, ...]) -> str:
    """Sentences as running text: Japanese has no space between them."""
    return ("" if lang == "ja" else " ").join(sentences)


def capitalised(sentence: str) -> str:
    """The sentence with its first letter in upper case (Japanese is unchanged)."""
    return sentence[:1].upper() + sentence[1:]
