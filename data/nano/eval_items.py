"""Write the items and task files of `workbench eval`: `python data/nano/eval_items.py [--out DIR]`.

Everything comes from the generator's held-out side: operands that no training text holds, and wordings of facts that
were left out in that language (and at that effort). `group` names what items share: a fact, or a family of numbers
{a, b, a + b}; it is the same in both languages and at every effort.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from generator import relations
from generator.arithmetic import LIMIT, addition, subtraction
from generator.conversations import conversation_held_out, thinking
from generator.documents import WORKED_MARKS, document
from generator.facts import Relation
from generator.parallel import EFFORTS, LANGUAGES, Problem, pair_held_out, seeded

TASKS = Path(__file__).parents[2] / "workbench" / "evals" / "tasks"
EVAL_SEED = 7  # as in measure_loss.py; training uses another seed
DATE = "2026-06-01"
BOS = "<|startoftext|>"
N_CHOICES = 4
N_SUMS = {"sums": 48, "worked": 24, "answers": 24}
N_FACTS = 24  # per language and effort
N_TEXTS = 12  # per language
QUESTION_MARKS = {"ja": ("質問：", "答え："), "en": ("Question: ", "Answer: ")}

Item = dict[str, Any]


def items() -> dict[str, list[Item]]:
    """By file name: the items, in a fixed order."""
    return {
        "facts": list(facts()),
        "sums": list(sums()),
        "worked": list(worked()),
        "texts": list(texts()),
        "answers": [*fact_answers(), *sum_answers()],
    }


def facts() -> Iterator[Item]:
    """Every held-out wording of a fact, with objects of other facts of its relation as wrong choices."""
    for lang in LANGUAGES:
        for relation in relations.RELATIONS:
            for row in range(len(relation.rows)):
                for template in relations.RECALLED:
                    if relations.statement_held_out(relation, row, template, lang):
                        yield _fact_item(relation, row, template, lang)


def _fact_item(relation: Relation, row: int, template: int, lang: str) -> Item:
    before, right = relations.recall_prompt(relation, row, template, lang)
    side = LANGUAGES.index(lang)
    space = " " if relation.statements[lang][template].split("{o}")[0].endswith(" ") else ""
    after = right.removeprefix(relation.rows[row][1][side])
    wrong = [space + relation.rows[other][1][side] + after for other in _other_objects(relation, row)]
    key = relations.fact_problem(relation, row).key
    return _choice_item(f"{key}/{template}", key, lang, relation.name, BOS + before, space + right, wrong)


def _other_objects(relation: Relation, row: int) -> list[int]:
    """Rows that hold other objects, the same for both languages, in an order of this fact's own."""
    found, objects = [], {relation.rows[row][1]}
    order = list(range(len(relation.rows)))
    seeded("objects", relation.name, row).shuffle(order)
    for other in order:
        if relation.rows[other][1] not in objects:
            objects.add(relation.rows[other][1])
            found.append(other)
    return found[: N_CHOICES - 1]


def _choice_item(name: str, group: str, lang: str, kind: str, prompt: str, right: str, wrong: list[str]) -> Item:
    choices = [right, *wrong]
    seeded("choices", name, lang).shuffle(choices)
    return {
        "id": f"{name}/{lang}", "group": group, "lang": lang, "kind": kind,
        "prompt": prompt, "choices": choices, "gold": choices.index(right),
    }  # fmt: skip


def held_out_sums(name: str) -> list[tuple[str, Problem]]:
    """(family, problem): half additions and half subtractions, no operands twice."""
    pairs = [(a, b) for a in range(LIMIT) for b in range(LIMIT - a) if pair_held_out(a, b)]
    rng, half = seeded("eval sums", name), N_SUMS[name] // 2
    additions = [(a, b, addition(a, b)) for a, b in rng.sample(pairs, half)]
    subtractions = [(a, b, subtraction(a + b, b)) for a, b in rng.sample(pairs, half)]
    return [(f"family:{min(a, b)}+{max(a, b)}", problem) for a, b, problem in additions + subtractions]


def sums() -> Iterator[Item]:
    """Sums in the form of a document's questions, answered outright; wrong choices are near the right one."""
    for lang in LANGUAGES:
        ask, answer = QUESTION_MARKS[lang]
        for group, problem in held_out_sums("sums"):
            rng = seeded("sum", problem.key)
            question = problem.questions[lang][rng.randrange(3)]
            before, after = problem.answer[lang].rsplit(problem.value[lang], 1)
            prompt = f"{BOS}{ask}{question}\n{answer}{before.rstrip(' ')}"
            values = [problem.value[lang], *_near(int(problem.value[lang]), rng)]
            right, *wrong = [f" {value}{after}" for value in values]
            yield _choice_item(problem.key, group, lang, problem.task, prompt, right, wrong)


def _near(value: int, rng: Random) -> list[str]:
    near = [value + step for step in (-10, -2, -1, 1, 2, 10) if 0 <= value + step < LIMIT]
    return [str(other) for other in rng.sample(near, N_CHOICES - 1)]


def worked() -> Iterator[Item]:
    """Sums that a base model works out in the form of its documents."""
    for lang in LANGUAGES:
        ask, think, answer = WORKED_MARKS[lang]
        for group, problem in held_out_sums("worked"):
            prompt = f"{BOS}{ask}{problem.questions[lang][0]}\n{think}".rstrip(" ")
            yield {
                "id": f"{problem.key}/{lang}", "group": group, "lang": lang, "kind": problem.task,
                "prompt": prompt, "mark": answer.strip(), "answer": problem.answer[lang],
            }  # fmt: skip


def texts() -> Iterator[Item]:
    """Held-out documents, as they are."""
    for lang in LANGUAGES:
        found: list[Item] = []
        index = 0
        while len(found) < N_TEXTS:
            made = document(EVAL_SEED, index, held_out=True)
            if made.lang == lang:
                name = f"document:{index}"
                found.append({"id": name, "group": name, "lang": lang, "kind": made.kind, "text": made.text})
            index += 1
        yield from found


def fact_answers() -> Iterator[Item]:
    """Questions about facts in a wording left out at that effort and language; the same facts wherever possible."""
    every = [(relation, row) for relation in relations.RELATIONS for row in range(len(relation.rows))]
    problems = [relations.fact_problem(*fact) for fact in every]
    problems.sort(key=lambda problem: hashlib.sha256(problem.key.encode()).hexdigest())
    for lang in LANGUAGES:
        for effort in EFFORTS:
            found = [
                _answer_item("facts", problem, problem.key, lang, effort, phrasings[0])
                for problem in problems
                if (phrasings := [n for n in range(3) if conversation_held_out(problem, n, effort, lang)])
            ]
            yield from found[:N_FACTS]


def sum_answers() -> Iterator[Item]:
    """The same held-out sums in every cell."""
    for lang in LANGUAGES:
        for effort in EFFORTS:
            for group, problem in held_out_sums("answers"):
                phrasing = seeded("phrasing", problem.key, effort).randrange(3)
                yield _answer_item("sums", problem, group, lang, effort, phrasing)


def _answer_item(kind: str, problem: Problem, group: str, lang: str, effort: str, phrasing: int) -> Item:
    return {
        "id": f"{problem.key}/{phrasing}/{lang}/{effort}", "group": group, "lang": lang, "kind": kind,
        "effort": effort, "date": DATE, "question": problem.questions[lang][phrasing],
        "analysis": thinking(problem, lang, effort), "answer": problem.answer[lang],
    }  # fmt: skip


# By file of items: the template of its tasks (workbench/evals/tasks/_NAME) and their tags.
BASE_TASKS = {
    "facts": ("choices", ("workbench_base", "workbench_choices")),
    "sums": ("choices", ("workbench_base", "workbench_choices")),
    "worked": ("worked", ("workbench_base",)),
    "texts": ("texts", ("workbench_base",)),
}
CHAT_TASKS = {"answers": ("workbench_thinking",), "reference": ("workbench_thinking", "workbench_reference")}


def task_files() -> dict[str, str]:
    """By name: one short file per task, which includes the template of its kind."""
    found = {}
    for lang in LANGUAGES:
        for file, (template, tags) in BASE_TASKS.items():
            found |= _task_file(f"workbench_{file}_{lang}", template, tags, {"file": file, "lang": lang})
        for template, tags in CHAT_TASKS.items():
            for kind in ("facts", "sums"):
                for effort in EFFORTS:
                    name = f"workbench_{template}_{kind}_{lang}_{effort}"
                    cell = {"file": "answers", "lang": lang, "kind": kind, "effort": effort}
                    found |= _task_file(name, template, (*tags, f"workbench_{template}_{effort}"), cell)
    return found


def _task_file(name: str, template: str, tags: tuple[str, ...], cell: dict[str, str]) -> dict[str, str]:
    chosen = ", ".join(f"{key}: {value}" for key, value in cell.items())
    lines = [f"include: _{template}", f"task: {name}", f"tag: [{', '.join(tags)}]", f"dataset_kwargs: {{{chosen}}}"]
    return {f"{name}.yaml": "\n".join(lines) + "\n"}


def files() -> dict[str, str]:
    """Every file by name, as text."""
    lines = {name: [json.dumps(item, ensure_ascii=False) for item in found] for name, found in items().items()}
    return {f"{name}.jsonl": "\n".join(texts) + "\n" for name, texts in lines.items()} | task_files()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the items and task files of `workbench eval`.")
    parser.add_argument("--out", type=Path, default=TASKS)
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf-8")
    print(f"{folder}: {', '.join(f'{len(found)} {name}' for name, found in items().items())}")


if __name__ == "__main__":
    main()
