"""Small reasoning problems: compare, sort, continue a sequence, count things in a story, put people in order."""

from __future__ import annotations

from random import Random

from generator.arithmetic import LIMIT, addition, draw_addends, subtraction
from generator.parallel import LANGUAGES, Problem, is_held_out, pair_held_out

NAMES = (
    ("ケン", "Ken"),
    ("ユイ", "Yui"),
    ("ハル", "Haru"),
    ("アオイ", "Aoi"),
    ("サラ", "Sara"),
    ("トム", "Tom"),
    ("リサ", "Lisa"),
    ("マリ", "Mari"),
    ("レン", "Ren"),
    ("エマ", "Emma"),
)
THINGS = (
    ("りんご", "apples"),
    ("みかん", "mandarins"),
    ("石", "stones"),
    ("卵", "eggs"),
    ("ボール", "balls"),
    ("箱", "boxes"),
    ("あめ", "candies"),
    ("おもちゃ", "toys"),
)
ORDERS = (  # Japanese "more", its form before a noun, English comparative and superlative
    ("背が高い", "背が高い", "taller", "tallest"),
    ("年上", "年上の", "older", "oldest"),
    ("足が速い", "足が速い", "faster", "fastest"),
    ("力が強い", "力が強い", "stronger", "strongest"),
)


def draw_comparison(rng: Random) -> Problem:
    """Which of two numbers is larger or smaller."""
    a, b = rng.sample(range(LIMIT), 2)
    larger = rng.random() < 0.5
    value = max(a, b) if larger else min(a, b)
    other = a + b - value
    sign = ">" if larger else "<"
    ja, en = ("大きい", "larger") if larger else ("小さい", "smaller")
    (v10, v1), (o10, o1) = divmod(value, 10), divmod(other, 10)
    by_tens = v10 != o10
    place = {"ja": "十の位" if by_tens else "一の位", "en": "tens" if by_tens else "ones"}
    left, right = (v10, o10) if by_tens else (v1, o1)
    return Problem(
        task="comparison",
        key=f"{a},{b},{en}",
        held_out=is_held_out("comparison", min(a, b), max(a, b)),
        questions={
            "ja": (f"{a} と {b} ではどちらが{ja}ですか。", f"{ja}のはどちらですか。{a} ですか、{b} ですか。"),
            "en": (f"Which is {en}, {a} or {b}?", f"Tell me the {en} of {a} and {b}."),
        },
        hint=dict.fromkeys(LANGUAGES, f"{value} {sign} {other}"),
        steps={
            "ja": (f"{place['ja']}を比べる。", f"{left} {sign} {right}。", f"だから {value} の方が{ja}。"),
            "en": (f"Compare the {place['en']}.", f"{left} {sign} {right}.", f"So {value} is {en}."),
        },
        check={
            "ja": ("確かめる。", f"{value} {sign} {other} は正しい。"),
            "en": ("Let me check.", f"{value} {sign} {other} is true."),
        },
        answer={"ja": f"{value} の方が{ja}です。", "en": f"{value} is {en}."},
        value=dict.fromkeys(LANGUAGES, str(value)),
    )


def draw_sorting(rng: Random) -> Problem:
    """Three numbers in ascending order."""
    numbers = rng.sample(range(LIMIT), 3)
    first, second, third = ordered = sorted(numbers)
    listing = {"ja": "、".join(map(str, numbers)), "en": ", ".join(map(str, numbers))}
    result = {"ja": "、".join(map(str, ordered)), "en": ", ".join(map(str, ordered))}
    return Problem(
        task="sorting",
        key=listing["en"],
        held_out=is_held_out("sorting", *ordered),
        questions={
            "ja": (f"{listing['ja']} を小さい順に並べてください。", f"小さい順にしてください。{listing['ja']}"),
            "en": (f"Sort {listing['en']} from small to large.", f"Put in ascending order: {listing['en']}"),
        },
        hint=dict.fromkeys(LANGUAGES, f"{first} < {second} < {third}"),
        steps={
            "ja": (f"一番小さいのは {first}。", f"次は {second}。", f"一番大きいのは {third}。"),
            "en": (f"The smallest is {first}.", f"The next is {second}.", f"The largest is {third}."),
        },
        check={
            "ja": ("確かめる。", f"{first} < {second} で、{second} < {third} だ。"),
            "en": ("Let me check.", f"{first} < {second} and {second} < {third}."),
        },
        answer={"ja": f"小さい順に {result['ja']} です。", "en": f"From small to large: {result['en']}."},
        value=result,
    )


def draw_sequence(rng: Random) -> Problem:
    """The fourth term of an arithmetic sequence."""
    step = rng.choice((1, 2, 3, 4, 5, 10))
    start = rng.randrange(LIMIT - 3 * step)
    a, b, c, d = (start + step * i for i in range(4))
    return Problem(
        task="sequence",
        key=f"{a},{b},{c}",
        held_out=any(pair_held_out(x, step) for x in (a, b, c)),
        questions={
            "ja": (f"{a}、{b}、{c} の次の数は何ですか。", f"数が {a}、{b}、{c} と続きます。次はいくつですか。"),
            "en": (f"What number comes after {a}, {b}, {c}?", f"The numbers go {a}, {b}, {c}. What is next?"),
        },
        hint=dict.fromkeys(LANGUAGES, f"{c} + {step} = {d}"),
        steps={
            "ja": (f"{b} - {a} = {step}。", f"{step} ずつ増える。", f"{c} + {step} = {d}。"),
            "en": (f"{b} - {a} = {step}.", f"It grows by {step}.", f"{c} + {step} = {d}."),
        },
        check={
            "ja": ("確かめる。", f"{c} - {b} = {step} で、{d} - {c} = {step} だ。"),
            "en": ("Let me check.", f"{c} - {b} = {step} and {d} - {c} = {step}."),
        },
        answer={"ja": f"次の数は {d} です。", "en": f"The next number is {d}."},
        value=dict.fromkeys(LANGUAGES, str(d)),
    )


def draw_story(rng: Random) -> Problem:
    """Somebody has things, gets or gives away some; how many are there now?"""
    a, b = draw_addends(rng)
    gets = rng.random() < 0.5
    if not gets:
        a += b
    sum_ = addition(a, b) if gets else subtraction(a, b)
    (ja, en), (thing_ja, thing_en) = rng.choice(NAMES), rng.choice(THINGS)
    total = sum_.value["en"]
    has = {"ja": f"{ja}は{thing_ja}を {a} 個持っています。", "en": f"{en} has {a} {thing_en}."}
    event = {
        "ja": f"{b} 個もらいました。" if gets else f"{b} 個あげました。",
        "en": f"{en} gets {b} more." if gets else f"{en} gives away {b}.",
    }
    kind = {"ja": "足し算だ。" if gets else "引き算だ。", "en": "This is addition." if gets else "This is subtraction."}
    return Problem(
        task="story",
        key=f"{en},{thing_en},{sum_.key}",
        held_out=sum_.held_out,
        questions={
            "ja": (
                f"{has['ja']}{event['ja']}今、何個ありますか。",
                f"{has['ja']}そして {event['ja']}今はいくつありますか。",
            ),
            "en": (
                f"{has['en']} {event['en']} How many are there now?",
                f"{has['en']} Then {event['en']} How many {thing_en} does {en} have?",
            ),
        },
        hint=sum_.hint,
        steps={lang: (kind[lang], *sum_.steps[lang]) for lang in LANGUAGES},
        check=sum_.check,
        answer={"ja": f"{thing_ja}は {total} 個です。", "en": f"There are {total} {thing_en}."},
        value=sum_.value,
    )


def draw_people(rng: Random) -> Problem:
    """Three people, two comparisons, who comes first?"""
    order = rng.randrange(len(ORDERS))
    (x_ja, x_en), (y_ja, y_en), (z_ja, z_en) = rng.sample(NAMES, 3)
    ja, ja_noun, more, most = ORDERS[order]
    facts = {
        "ja": [f"{x_ja}は{y_ja}より{ja}です。", f"{y_ja}は{z_ja}より{ja}です。"],
        "en": [f"{x_en} is {more} than {y_en}.", f"{y_en} is {more} than {z_en}."],
    }
    if swapped := rng.random() < 0.5:
        facts = {lang: said[::-1] for lang, said in facts.items()}
    return Problem(
        task="people",
        key=f"{more},{x_en},{y_en},{z_en},{swapped}",
        held_out=is_held_out("people", order, x_en, y_en, z_en),
        questions={
            "ja": (
                f"{''.join(facts['ja'])}一番{ja_noun}人は誰ですか。",
                f"{''.join(facts['ja'])}三人のうち、誰が一番{ja}ですか。",
            ),
            "en": (
                f"{' '.join(facts['en'])} Who is the {most}?",
                f"{' '.join(facts['en'])} Which of them is the {most}?",
            ),
        },
        hint={"ja": f"{x_ja}、{y_ja}、{z_ja}。", "en": f"{x_en}, {y_en}, {z_en}."},
        steps={
            "ja": (f"{x_ja}は{y_ja}より{ja}。", f"{y_ja}は{z_ja}より{ja}。", f"順番は{x_ja}、{y_ja}、{z_ja}。"),
            "en": (
                f"{x_en} is {more} than {y_en}.",
                f"{y_en} is {more} than {z_en}.",
                f"The order is {x_en}, {y_en}, {z_en}.",
            ),
        },
        check={
            "ja": ("確かめる。", f"{x_ja}より{ja_noun}人はいない。"),
            "en": ("Let me check.", f"Nobody is {more} than {x_en}."),
        },
        answer={"ja": f"一番{ja_noun}人は{x_ja}です。", "en": f"The {most} is {x_en}."},
        value={"ja": x_ja, "en": x_en},
    )
