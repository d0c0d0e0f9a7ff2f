"""Answers of a model: greedy completions, and the quick accuracies that the training log shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from batches import prompt_tokens
from generator import arithmetic, relations
from generator.arithmetic import draw
from generator.conversations import conversation
from generator.documents import WORKED_MARKS
from generator.parallel import EFFORTS, LANGUAGES, Problem, seeded

from workbench.chat import parse
from workbench.models import Llama

BATCH = 64


@torch.no_grad()
def complete(model: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy continuations of prompts of any lengths, in their order; the stop token is included."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    written: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        width = max(len(prompts[i]) for i in chosen)
        tokens = torch.full((len(chosen), width), 4)
        mask = torch.zeros(len(chosen), width, dtype=torch.long)
        for row, i in enumerate(chosen):
            tokens[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        found = model.generate(tokens, mask, max_new_tokens=max_new_tokens, stop_ids=(2, 13)).continuations()
        for i, ids in zip(chosen, found, strict=True):
            written[i] = ids
    return written


def channel_texts(model: Llama, prompt: Sequence[int], written: Sequence[int]) -> dict[str, str]:
    """The text of each channel that the model wrote, by channel name; a message without channel counts as ""."""
    found = parse([*prompt, *written], model.tokenizer)
    return {message.channel or "": message.content for message in found[-2:] if message.role == "assistant"}


def worked_correct(model: Llama, problems: Sequence[Problem], lang: str) -> list[bool]:
    """Whether a base model solves each problem, written as in its documents: "Problem: ... Thinking:"."""
    mark, thinking, answer = WORKED_MARKS[lang]
    prompts = [f"{mark}{problem.questions[lang][0]}\n{thinking}".rstrip() for problem in problems]
    written = complete(model, [model.tokenizer.to_tokens(prompt, bos=True) for prompt in prompts], 90)
    texts = [model.tokenizer.to_string(ids, text_start=False, skip_special=True) for ids in written]
    return [text.split(answer)[-1] == problem.answer[lang] for text, problem in zip(texts, problems, strict=True)]


def sums_correct(model: Llama, lang: str, n: int = 40) -> float:
    """Share of held-out sums and differences that a base model works out."""
    rng = seeded("quick")
    makes = (arithmetic.draw_addition, arithmetic.draw_subtraction)
    found = worked_correct(model, [draw(makes[i % 2], rng, held_out=True) for i in range(n)], lang)
    return sum(found) / n


def facts_correct(model: Llama, lang: str, n: int = 64) -> float:
    """Share of held-out statements of facts that the model completes."""
    rng = seeded("quick", lang)
    wanted: list[tuple[str, str]] = []
    while len(wanted) < n:
        relation = rng.choice(relations.RELATIONS)
        row, template = rng.randrange(len(relation.rows)), rng.choice(relations.RECALLED)
        if relations.statement_held_out(relation, row, template, lang):
            wanted.append(relations.recall_prompt(relation, row, template, lang))
    prompts = [model.tokenizer.to_tokens(before, bos=True) for before, _ in wanted]
    written = complete(model, prompts, 12)
    texts = [model.tokenizer.to_string(ids, text_start=False).strip() for ids in written]
    return sum(text.startswith(after) for text, (_, after) in zip(texts, wanted, strict=True)) / n


def chat_correct(model: Llama, task: str, lang: str, effort: str, n: int = 16) -> float:
    """Share of held-out questions whose final answer is exactly right."""
    talks = [conversation(1, i, True, task, lang, effort, plain=True) for i in range(n)]
    prompts = [prompt_tokens(model.tokenizer, talk) for talk in talks]
    written = complete(model, prompts, 160)
    finals = [channel_texts(model, *pair).get("final") for pair in zip(prompts, written, strict=True)]
    return sum(final == talk.final for final, talk in zip(finals, talks, strict=True)) / n


def quick_accuracy(model: Llama, is_thinking: bool) -> dict[str, float]:
    """A few accuracies, rounded, for the log."""
    if not is_thinking:
        found = {f"facts_{lang}": facts_correct(model, lang) for lang in LANGUAGES}
        found |= {f"sums_{lang}": sums_correct(model, lang) for lang in LANGUAGES}
    else:
        found = {
            f"{task}_{lang}_{effort}": chat_correct(model, task, lang, effort)
            for task in ("addition", "subtraction", "fact")
            for lang in LANGUAGES
            for effort in EFFORTS
        }
    return {name: round(value, 2) for name, value in found.items()}
