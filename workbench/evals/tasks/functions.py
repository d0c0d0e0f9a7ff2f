"""What the task files name: which items a task has, how they are asked, and how an answer is judged.

Per item, beside whether it is right: `logprob`, the log-probability of the whole right answer in nats, and for choices
`margin`, how far it is ahead of the best wrong one. An answer says the same in both languages, so nats per answer can
be compared between them where nats per token cannot.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

from workbench.chat import render

Item = dict[str, Any]
Scores = list[tuple[float, bool]]  # log-probability in nats, and whether every token was the most probable


def load(file: str, lang: str, kind: str | None = None, effort: str | None = None, **_: Any) -> dict[str, Any]:
    """The items of FILE.jsonl beside this module in one language, of one kind and effort where given.

    Nothing is downloaded or cached. The harness passes a task's metadata too, which say nothing of items.
    """
    cell = {"lang": lang, **({"kind": kind, "effort": effort} if effort else {})}
    lines = (Path(__file__).parent / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    items = [item for item in map(json.loads, lines) if all(item[key] == value for key, value in cell.items())]
    return {"test": datasets.Dataset.from_list(items)}


def question(item: Item) -> str:
    """The conversation up to where the assistant begins, at the item's effort and on its date."""
    return render([{"role": "user", "content": item["question"]}], effort=item["effort"], date=item["date"])


def reference(item: Item) -> str:
    """All that the assistant should write: the thinking of that effort, then the answer."""
    return (
        f"<|channel|>analysis<|message|>{item['analysis']}<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{item['answer']}<|return|>"
    )


def judge_choices(item: Item, results: Scores) -> dict[str, float]:
    scores = [score for score, _ in results]
    right = scores[item["gold"]]
    best_wrong = max(score for place, score in enumerate(scores) if place != item["gold"])
    return {"acc": float(right > best_wrong), "logprob": right, "margin": right - best_wrong}


def judge_reference(item: Item, results: Scores) -> dict[str, float]:
    """acc: whether every token of the reference is the most probable one, so that greedy writing gives it."""
    ((score, greedy),) = results
    return {"acc": float(greedy), "logprob": score}


def judge_text(item: Item, results: list[float]) -> dict[str, float | tuple[float, int]]:
    (score,) = results
    return {"bits_per_byte": (score, len(item["text"].encode())), "logprob": score}


def judge_answer(item: Item, results: list[str]) -> dict[str, float]:
    return {"exact_match": float(results[0].strip() == item["answer"])}


def judge_worked(item: Item, results: list[str]) -> dict[str, float]:
    """What stands after the last mark, "Answer:" or the like, must be the answer."""
    return {"exact_match": float(results[0].split(item["mark"])[-1].strip() == item["answer"])}
