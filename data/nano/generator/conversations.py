"""Conversations for the thinking models: how much is thought depends on the effort, the language on the user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from random import Random

from generator import arithmetic, reasoning, relations, talk
from generator.arithmetic import draw
from generator.documents import draw_fact
from generator.parallel import EFFORTS, LANGUAGES, Problem, is_held_out, join, seeded

OPENING = {"ja": "落ち着いて順番に考えよう。", "en": "Let me think step by step."}
FACT_TASKS = tuple(relation.name for relation in relations.RELATIONS)

# What a developer may ask for, and what the answer then looks like.
INSTRUCTIONS: tuple[tuple[dict[str, str], Callable[[Problem, str], str]], ...] = (
    (
        {"ja": "答えだけを書いてください。", "en": "Write only the answer itself."},
        lambda problem, lang: problem.value[lang],
    ),
    (
        {"ja": "最初に「答え：」と書いてください。", "en": 'Begin with "Answer:".'},
        lambda problem, lang: {"ja": "答え：", "en": "Answer: "}[lang] + problem.answer[lang],
    ),
    (
        {"ja": "最後に「以上です。」と書いてください。", "en": 'End with "That is all."'},
        lambda problem, lang: problem.answer[lang] + {"ja": "以上です。", "en": " That is all."}[lang],
    ),
)

TASKS: dict[str, tuple[float, Callable[[Random], Problem]]] = {
    "addition": (0.15, arithmetic.draw_addition),
    "subtraction": (0.15, arithmetic.draw_subtraction),
    "fact": (0.34, draw_fact),
    "comparison": (0.06, reasoning.draw_comparison),
    "sorting": (0.05, reasoning.draw_sorting),
    "sequence": (0.06, reasoning.draw_sequence),
    "story": (0.08, reasoning.draw_story),
    "people": (0.05, reasoning.draw_people),
    "small_talk": (0.02, talk.draw_small_talk),
    "telling": (0.04, talk.draw_telling),
}


@dataclass(frozen=True)
class Conversation:
    """One conversation that ends in thinking and a final answer.

    Attributes:
        task, key: of the last question.
        lang: language of the last question, of the thinking and of the answer.
        date: the current date in the system message, YYYY-MM-DD.
        developer: instructions, or None.
        history: earlier (question, answer) turns.
    """

    task: str
    key: str
    lang: str
    effort: str
    date: str
    developer: str | None
    history: tuple[tuple[str, str], ...]
    user: str
    analysis: str
    final: str


def thinking(problem: Problem, lang: str, effort: str) -> str:
    """What is written in the analysis channel: the hint, the steps, or the steps with an opening and a check."""
    if effort == "low":
        return problem.hint[lang]
    if effort == "medium":
        return join(lang, problem.steps[lang])
    return join(lang, (OPENING[lang], *problem.steps[lang], *problem.check[lang]))


def conversation_held_out(problem: Problem, phrasing: int, effort: str, lang: str) -> bool:
    """Whether the question is kept from training: by operands, for facts by (fact, wording, effort, language)."""
    if problem.task in FACT_TASKS:
        return is_held_out("conversation", problem.key, phrasing, effort, lang)
    return problem.held_out


def draw_task(rng: Random, task: str | None = None) -> Problem:
    """A problem of the named task ("fact" for any relation), or of a random one."""
    name = task or rng.choices(tuple(TASKS), [weight for weight, _ in TASKS.values()])[0]
    return TASKS[name][1](rng)


def _turn(rng: Random, lang: str) -> tuple[str, str]:
    """An earlier turn; its operands are never held out."""
    problem = draw(draw_task, rng, held_out=False)
    return rng.choice(problem.questions[lang]), problem.answer[lang]


def conversation(
    seed: int,
    index: int,
    held_out: bool = False,
    task: str | None = None,
    lang: str | None = None,
    effort: str | None = None,
    plain: bool = False,
) -> Conversation:
    """Conversation number `index`, from one side of the split; the same for the same arguments.

    Args:
        task, lang, effort: fixed where given, else random.
        plain: one turn, no developer message.
    """
    rng = seeded("conversation", seed, index, held_out, task, lang, effort)
    chosen_lang, chosen_effort = rng.choice(LANGUAGES), rng.choice(EFFORTS)
    lang, effort = lang or chosen_lang, effort or chosen_effort
    while True:
        problem = draw_task(rng, task)
        phrasing = rng.randrange(len(problem.questions[lang]))
        if conversation_held_out(problem, phrasing, effort, lang) == held_out:
            break
    developer, final = None, problem.answer[lang]
    if not plain and rng.random() < 0.1:
        instruction, shape = rng.choice(INSTRUCTIONS)
        developer, final = instruction[lang], shape(problem, lang)
    turns = 0 if plain else rng.choices((0, 1, 2), (0.85, 0.1, 0.05))[0]
    return Conversation(
        task=problem.task,
        key=problem.key,
        lang=lang,
        effort=effort,
        date=str(date(2026, 1, 1) + timedelta(days=rng.randrange(365))),
        developer=developer,
        history=tuple(_turn(rng, lang) for _ in range(turns)),
        user=problem.questions[lang][phrasing],
        analysis=thinking(problem, lang, effort),
        final=final,
    )
