"""Sums and differences of numbers below 50, with the steps of written calculation."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from generator.parallel import LANGUAGES, Problem, pair_held_out

LIMIT = 50  # every number in a problem, the result included, is below this


def digits(n: int) -> tuple[int, int]:
    """Tens and ones."""
    return divmod(n, 10)


Steps = dict[str, tuple[str, ...]]


def written_addition(a: int, b: int) -> tuple[str, Steps]:
    """Written addition, ones first, then tens with the carry: in short, and step by step in both languages."""
    (a10, a1), (b10, b1) = digits(a), digits(b)
    ones, tens = a1 + b1, f"{a10} + {b10}"
    if ones < 10:
        carry = {"ja": "。", "en": "."}
    else:
        tens += " + 1"
        carry = {"ja": "、1 繰り上がる。", "en": ", carry 1."}
    total = a10 + b10 + ones // 10
    return f"{a1} + {b1} = {ones}, {tens} = {total}", {
        "ja": (f"一の位は {a1} + {b1} = {ones}{carry['ja']}", f"十の位は {tens} = {total}。", f"合わせて {a + b}。"),
        "en": (f"Ones: {a1} + {b1} = {ones}{carry['en']}", f"Tens: {tens} = {total}.", f"Together {a + b}."),
    }


def written_subtraction(a: int, b: int) -> tuple[str, Steps]:
    """Written subtraction, ones first, borrowing from the tens where needed: in short, and step by step."""
    (a10, a1), (b10, b1) = digits(a), digits(b)
    tens = f"{a10} - {b10}"
    if a1 >= b1:
        borrow = {"ja": "。", "en": "."}
    else:
        a1, tens = a1 + 10, tens + " - 1"
        borrow = {"ja": "、1 借りる。", "en": ", borrow 1."}
    total = (a - b - (a1 - b1)) // 10
    return f"{a1} - {b1} = {a1 - b1}, {tens} = {total}", {
        "ja": (
            f"一の位は {a1} - {b1} = {a1 - b1}{borrow['ja']}",
            f"十の位は {tens} = {total}。",
            f"合わせて {a - b}。",
        ),
        "en": (f"Ones: {a1} - {b1} = {a1 - b1}{borrow['en']}", f"Tens: {tens} = {total}.", f"Together {a - b}."),
    }


def addition(a: int, b: int) -> Problem:
    """a + b."""
    total = a + b
    short, steps = written_addition(a, b)
    return Problem(
        task="addition",
        key=f"{a}+{b}",
        held_out=pair_held_out(a, b),
        questions={
            "ja": (
                f"{a} + {b} はいくつですか。",
                f"{a} + {b} を計算してください。",
                f"{a} と {b} を足すといくつになりますか。",
            ),
            "en": (f"What is {a} + {b}?", f"Calculate {a} + {b}.", f"How much do {a} and {b} make together?"),
        },
        hint=dict.fromkeys(LANGUAGES, short),
        steps=steps,
        check={
            "ja": ("確かめる。", f"{total} - {b} = {a}。", "だから合っている。"),
            "en": ("Let me check.", f"{total} - {b} = {a}.", "So it is right."),
        },
        answer={"ja": f"{a} + {b} の答えは {total} です。", "en": f"The answer to {a} + {b} is {total}."},
        value=dict.fromkeys(LANGUAGES, str(total)),
    )


def subtraction(a: int, b: int) -> Problem:
    """a - b, for a >= b."""
    rest = a - b
    short, steps = written_subtraction(a, b)
    return Problem(
        task="subtraction",
        key=f"{a}-{b}",
        held_out=pair_held_out(b, rest),
        questions={
            "ja": (
                f"{a} - {b} はいくつですか。",
                f"{a} - {b} を計算してください。",
                f"{a} から {b} を引くといくつになりますか。",
            ),
            "en": (f"What is {a} - {b}?", f"Calculate {a} - {b}.", f"How much is left when {b} is taken from {a}?"),
        },
        hint=dict.fromkeys(LANGUAGES, short),
        steps=steps,
        check={
            "ja": ("確かめる。", f"{rest} + {b} = {a}。", "だから合っている。"),
            "en": ("Let me check.", f"{rest} + {b} = {a}.", "So it is right."),
        },
        answer={"ja": f"{a} - {b} の答えは {rest} です。", "en": f"The answer to {a} - {b} is {rest}."},
        value=dict.fromkeys(LANGUAGES, str(rest)),
    )


def draw_addends(rng: Random) -> tuple[int, int]:
    """Two numbers whose sum is below LIMIT, every such pair equally likely."""
    total = max(rng.randrange(LIMIT), rng.randrange(LIMIT))
    a = rng.randint(0, total)
    return a, total - a


def draw_equation(rng: Random, held_out: bool) -> str:
    """One line such as "27 + 15 = 42"; every second one is of one-digit numbers, which are never held out."""
    if not held_out and rng.random() < 0.5:
        a, b = rng.randrange(10), rng.randrange(10)
    else:
        while pair_held_out(*(addends := draw_addends(rng))) != held_out:
            pass
        a, b = addends
    return f"{a} + {b} = {a + b}" if rng.random() < 0.5 else f"{a + b} - {b} = {a}"


def every_held_out() -> dict[str, list[Problem]]:
    """All held-out problems of two numbers, by task."""
    pairs = [(a, total - a) for total in range(LIMIT) for a in range(total + 1) if pair_held_out(a, total - a)]
    return {"addition": [addition(a, b) for a, b in pairs], "subtraction": [subtraction(a + b, b) for a, b in pairs]}


def draw_addition(rng: Random) -> Problem:
    return addition(*draw_addends(rng))


def draw_subtraction(rng: Random) -> Problem:
    a, b = draw_addends(rng)
    return subtraction(a + b, b)


def draw(make: Callable[[Random], Problem], rng: Random, held_out: bool) -> Problem:
    """The first problem from `make` that belongs to the wanted side of the split."""
    while (problem := make(rng)).held_out != held_out:
        pass
    return problem
