"""Plain documents for the base models: sums, facts, questions with answers, worked problems and stories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from generator import arithmetic, facts, reasoning, relations, stories, talk
from generator.arithmetic import draw
from generator.parallel import LANGUAGES, Problem, join, seeded

Draw = Callable[[Random], Problem]

# A relation comes up by how many facts it holds, within limits: number words follow a rule, weekdays are few.
RELATION_WEIGHTS = tuple(min(max(len(relation.rows), 20), 60) for relation in relations.RELATIONS)

WORKED_MARKS = {"ja": ("問題：", "考え方：", "答え："), "en": ("Problem: ", "Thinking: ", "Answer: ")}


@dataclass(frozen=True)
class Document:
    """One plain text and the language it is written in."""

    lang: str
    kind: str
    text: str


def draw_fact(rng: Random) -> Problem:
    """One fact as a question."""
    relation = rng.choices(relations.RELATIONS, RELATION_WEIGHTS)[0]
    return relations.fact_problem(relation, rng.randrange(len(relation.rows)))


REASONING: tuple[Draw, ...] = (
    reasoning.draw_comparison,
    reasoning.draw_sorting,
    reasoning.draw_sequence,
    reasoning.draw_story,
    reasoning.draw_people,
)


def draw_problem(rng: Random, held_out: bool) -> Problem:
    """Any problem: sums and facts most often.  Facts have no held-out side, so they only come with `held_out` False."""
    roll = rng.random()
    if roll < 0.48:
        return draw(rng.choice((arithmetic.draw_addition, arithmetic.draw_subtraction)), rng, held_out)
    if roll < 0.75 or held_out:
        return draw(rng.choice(REASONING), rng, held_out)
    return draw_fact(rng)


def sums(rng: Random, lang: str, held_out: bool) -> str:
    """A list of equations, with some of the times table between them."""
    lines = []
    for _ in range(rng.randint(6, 12)):
        if rng.random() < 0.15:
            (product, _), (value, _) = rng.choice(facts.PRODUCTS)
            lines.append(f"{product} = {value}")
        else:
            lines.append(arithmetic.draw_equation(rng, held_out))
    return "\n".join(lines)


def fact_list(rng: Random, lang: str, held_out: bool) -> str:
    """Facts one after the other, each in one of its wordings."""
    sentences: list[str] = []
    wanted = rng.randint(3, 7)
    while len(sentences) < wanted:
        relation = rng.choices(relations.RELATIONS, RELATION_WEIGHTS)[0]
        row, template = rng.randrange(len(relation.rows)), rng.randrange(len(relation.statements[lang]))
        if relations.statement_held_out(relation, row, template, lang) == held_out:
            sentences.append(relations.statement(relation, row, template, lang))
    return join(lang, sentences) if rng.random() < 0.5 else "\n".join(sentences)


def questions(rng: Random, lang: str, held_out: bool) -> str:
    """Questions with their answers, two to four of them."""
    marks = {"ja": ("質問：", "答え："), "en": ("Question: ", "Answer: ")}[lang]
    lines = []
    for _ in range(rng.randint(2, 4)):
        problem = draw_problem(rng, held_out)
        lines += [marks[0] + rng.choice(problem.questions[lang]), marks[1] + problem.answer[lang]]
    return "\n".join(lines)


def worked(rng: Random, lang: str, held_out: bool) -> str:
    """One problem with its steps and its answer."""
    problem = draw_problem(rng, held_out)
    steps = problem.steps[lang] + (problem.check[lang] if rng.random() < 0.5 else ())
    parts = (rng.choice(problem.questions[lang]), join(lang, steps), problem.answer[lang])
    return "\n".join(mark + part for mark, part in zip(WORKED_MARKS[lang], parts, strict=True))


def counting(rng: Random, lang: str, held_out: bool) -> str:
    """A stretch of the numbers, the weekdays or the months in order."""
    cycle = rng.choice((facts.WEEKDAYS, facts.MONTHS, tuple(map(facts.number_word, range(100)))))
    start, length = rng.randrange(len(cycle)), rng.randint(4, 10)
    words = [cycle[(start + i) % len(cycle)][LANGUAGES.index(lang)] for i in range(length)]
    return "、".join(words) + "。" if lang == "ja" else ", ".join(words) + "."


def telling(rng: Random, lang: str, held_out: bool) -> str:
    """A short conversation written as a play."""
    marks = {"ja": ("人：", "答え："), "en": ("Person: ", "Reply: ")}[lang]
    problem = rng.choice((talk.draw_small_talk, talk.draw_telling))(rng)
    return f"{marks[0]}{rng.choice(problem.questions[lang])}\n{marks[1]}{problem.answer[lang]}"


def story(rng: Random, lang: str, held_out: bool) -> str:
    """A plain story."""
    return stories.story(rng)[lang]


KINDS: dict[str, tuple[float, Callable[[Random, str, bool], str]]] = {
    "sums": (0.10, sums),
    "facts": (0.28, fact_list),
    "questions": (0.12, questions),
    "worked": (0.38, worked),
    "counting": (0.03, counting),
    "telling": (0.02, telling),
    "story": (0.07, story),
}


def document(seed: int, index: int, held_out: bool = False) -> Document:
    """Document number `index`: the same for the same arguments, whatever was made before it.

    With `held_out` every problem and every wording of a fact in it comes from the held-out side of the split.
    """
    rng = seeded("document", seed, index, held_out)
    lang = rng.choice(LANGUAGES)
    kind = rng.choices(tuple(KINDS), [weight for weight, _ in KINDS.values()])[0]
    return Document(lang, kind, KINDS[kind][1](rng, lang, held_out))
