"""Held-out accuracy by greedy generation, length of the thinking, and the language of the answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from batches import prompt_tokens
from generator import relations
from generator.arithmetic import draw, every_held_out
from generator.conversations import TASKS, Conversation, conversation, conversation_held_out, thinking
from generator.parallel import EFFORTS, LANGUAGES, Problem, seeded
from progress import channel_texts, complete, worked_correct

from workbench.models import Llama

EVAL_SEED = 7  # training uses another seed
N_PER_CELL = 40
EVERY = every_held_out()  # sums and differences, of which there are few enough
OPERAND_TASKS = tuple(task for task in TASKS if task not in ("fact", "small_talk", "telling"))
JAPANESE = re.compile(r"[ぁ-んァ-ヴ一-龥]")


@dataclass(frozen=True)
class Answered:
    """What a model wrote for one conversation."""

    talk: Conversation
    analysis: str | None
    final: str | None
    n_analysis: int  # tokens
    ended: bool  # wrote <|return|>

    @property
    def correct(self) -> bool:
        return self.ended and self.final == self.talk.final


def held_out_fact_talks(lang: str, effort: str) -> Iterator[Conversation]:
    """Every held-out (fact, wording) of this language and effort."""
    for relation in relations.RELATIONS:
        for row in range(len(relation.rows)):
            problem = relations.fact_problem(relation, row)
            for phrasing in range(len(problem.questions[lang])):
                if conversation_held_out(problem, phrasing, effort, lang):
                    yield asked(problem, phrasing, lang, effort, task=relation.name)


def asked(problem: Problem, phrasing: int, lang: str, effort: str, task: str) -> Conversation:
    """One question in one of its wordings, without anything before it."""
    return Conversation(
        task=task,
        key=problem.key,
        lang=lang,
        effort=effort,
        date="2026-06-01",
        developer=None,
        history=(),
        user=problem.questions[lang][phrasing],
        analysis=thinking(problem, lang, effort),
        final=problem.answer[lang],
    )


def held_out_talks(lang: str, effort: str) -> list[Conversation]:
    """The held-out questions of one cell: all facts, sums and differences, and a fixed number for every other task.

    Wordings of sums and differences take turns; those of other tasks are drawn.
    """
    talks = list(held_out_fact_talks(lang, effort))
    for task, problems in EVERY.items():
        talks += [
            asked(problem, place % len(problem.questions[lang]), lang, effort, task)
            for place, problem in enumerate(problems)
        ]
    for task in OPERAND_TASKS:
        if task in EVERY:
            continue
        talks += [conversation(EVAL_SEED, i, True, task, lang, effort, plain=True) for i in range(N_PER_CELL)]
    return talks


def answer_all(model: Llama, talks: list[Conversation]) -> list[Answered]:
    """Let the model think and answer, greedily."""
    prompts = [prompt_tokens(model.tokenizer, talk) for talk in talks]
    answered = []
    for talk, prompt, written in zip(talks, prompts, complete(model, prompts, 160), strict=True):
        texts = channel_texts(model, prompt, written)
        analysis = texts.get("analysis")
        n_analysis = 0 if analysis is None else len(model.tokenizer.encode_literal(analysis))
        ended = bool(written) and written[-1] == model.tokenizer.eos_id
        answered.append(Answered(talk, analysis, texts.get("final"), n_analysis, ended))
    return answered


def language_of(text: str) -> str | None:
    """Japanese if there is any kana or kanji, else English if there is any letter."""
    if JAPANESE.search(text):
        return "ja"
    return "en" if re.search("[A-Za-z]", text) else None


def share(values: Iterable[bool]) -> float:
    """Share of true values."""
    found = list(values)
    return sum(found) / len(found)


def _cell(answered: list[Answered]) -> dict[str, object]:
    """Figures of one language and effort."""
    facts = [a for a in answered if a.talk.task not in OPERAND_TASKS]
    by_task = {task: [a for a in answered if a.talk.task == task] for task in OPERAND_TASKS}
    by_task["fact"] = facts
    return {
        "accuracy": {task: share(a.correct for a in group) for task, group in by_task.items()},
        "n": {task: len(group) for task, group in by_task.items()},
        "analysis_tokens": sum(a.n_analysis for a in answered) / len(answered),
        "final_in_prompt_language": share(language_of(a.final or "") == a.talk.lang for a in answered),
        "well_formed": share(a.ended and a.analysis is not None and a.final is not None for a in answered),
    }


def chat_figures(model: Llama) -> dict[str, object]:
    """Accuracy, length of the thinking and language of the answers by language and effort; fact recall by relation."""
    cells: dict[str, dict[str, object]] = {lang: {} for lang in LANGUAGES}
    everything: list[Answered] = []
    for lang in LANGUAGES:
        for effort in EFFORTS:
            answered = answer_all(model, held_out_talks(lang, effort))
            cells[lang][effort] = _cell(answered)
            everything += answered
    by_relation = {
        relation.name: {
            lang: share(a.correct for a in everything if a.talk.task == relation.name and a.talk.lang == lang)
            for lang in LANGUAGES
        }
        for relation in relations.RELATIONS
    }
    return {"cells": cells, "facts_by_relation": by_relation}


def problem_accuracy(model: Llama, task: str, lang: str) -> float:
    """Share of held-out problems that a base model works out in the form of its documents."""
    rng = seeded("base", task, lang)
    problems = EVERY.get(task) or [draw(TASKS[task][1], rng, held_out=True) for _ in range(N_PER_CELL)]
    return share(worked_correct(model, problems, lang))


def fact_accuracy(model: Llama, lang: str) -> float:
    """Share of all held-out wordings of facts that a base model completes."""
    wanted = [
        relations.recall_prompt(relation, row, template, lang)
        for relation in relations.RELATIONS
        for row in range(len(relation.rows))
        for template in relations.RECALLED
        if relations.statement_held_out(relation, row, template, lang)
    ]
    texts = continuations(model, [before for before, _ in wanted], 16)
    return share(text.strip().startswith(after) for text, (_, after) in zip(texts, wanted, strict=True))


def continuations(model: Llama, prompts: list[str], max_new_tokens: int) -> list[str]:
    """What a base model writes after texts, up to the end of the document."""
    ids = [model.tokenizer.to_tokens(prompt, bos=True) for prompt in prompts]
    written = complete(model, ids, max_new_tokens)
    return [model.tokenizer.to_string(row, text_start=False, skip_special=True) for row in written]


def completion_figures(model: Llama) -> dict[str, dict[str, float]]:
    """By language: accuracy of a base model per task."""
    return {
        lang: {task: problem_accuracy(model, task, lang) for task in OPERAND_TASKS}
        | {"fact": fact_accuracy(model, lang)}
        for lang in LANGUAGES
    }
