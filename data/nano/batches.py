"""Endless training batches: generated examples, grouped by length, as token ids with the positions that are learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from generator.conversations import Conversation, conversation
from generator.documents import document
from generator.parallel import seeded
from torch import Tensor

from workbench.chat import render_tokens
from workbench.io.tokens import Tokenizer

POOL_BATCHES = 16  # examples are sorted by length within a pool of about this many batches


class Example(NamedTuple):
    """Token ids, and from which position on they are to be predicted."""

    ids: list[int]
    learn_from: int


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right.

    Attributes:
        tokens: [batch pos], what the model reads.
        targets: [batch pos], the next token, or -1 where nothing is learned.
        valid: [batch pos], whether this is a token and not padding.
    """

    tokens: Tensor
    targets: Tensor
    valid: Tensor


def document_example(tokenizer: Tokenizer, seed: int, index: int) -> Example:
    """A plain document between <|startoftext|> and <|return|>, as in LLM-jp-4's pre-training; all of it is learned."""
    ids = tokenizer.to_tokens(document(seed, index).text, bos=True)
    return Example([*ids, tokenizer.eos_id], 1)


def messages(talk: Conversation, answered: bool) -> list[dict[str, str]]:
    """A conversation in the form `workbench.chat.render` takes, with or without its last answer."""
    turns = [{"role": "developer", "content": talk.developer}] if talk.developer else []
    for question, answer in talk.history:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    turns += [{"role": "user", "content": talk.user}]
    if answered:
        turns += [{"role": "assistant", "content": talk.final, "thinking": talk.analysis}]
    return turns


def prompt_tokens(tokenizer: Tokenizer, talk: Conversation) -> list[int]:
    """A conversation up to where the assistant's thinking begins."""
    return render_tokens(messages(talk, answered=False), tokenizer, effort=talk.effort, date=talk.date)


def chat_example(tokenizer: Tokenizer, seed: int, index: int) -> Example:
    """A conversation of which the last turn is learned: its thinking, its answer and the tokens between them."""
    talk = conversation(seed, index)
    ids = render_tokens(
        messages(talk, answered=True), tokenizer, effort=talk.effort, date=talk.date, add_generation_prompt=False
    )
    return Example(ids, len(prompt_tokens(tokenizer, talk)))


def examples(tokenizer: Tokenizer, seed: int, first: int, chat_share: float) -> Iterator[Example]:
    """Examples number `first` and on; which ones are conversations depends on the number alone."""
    index = first
    while True:
        is_chat = seeded("mix", seed, index).random() < chat_share
        yield (chat_example if is_chat else document_example)(tokenizer, seed, index)
        index += 1


def collate(rows: list[Example], pad_id: int) -> Batch:
    """Pad to the longest row and shift by one."""
    width = max(len(row.ids) for row in rows) - 1
    tokens = torch.full((len(rows), width), pad_id)
    targets = torch.full((len(rows), width), -1)
    for i, (ids, learn_from) in enumerate(rows):
        tokens[i, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[i, learn_from - 1 : len(ids) - 1] = torch.tensor(ids[learn_from:])
    valid = torch.arange(width) < torch.tensor([len(row.ids) - 1 for row in rows])[:, None]
    return Batch(tokens, targets, valid)


def pool(tokenizer: Tokenizer, seed: int, first: int, chat_share: float, batch_tokens: int) -> tuple[list[Batch], int]:
    """About POOL_BATCHES batches of at most `batch_tokens` padded tokens, and the number of the next unused example."""
    rows: list[Example] = []
    total = 0
    for row in examples(tokenizer, seed, first, chat_share):
        rows.append(row)
        total += len(row.ids)
        if total >= POOL_BATCHES * batch_tokens:
            break
    groups: list[list[Example]] = [[]]
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if groups[-1] and len(row.ids) * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(row)
    seeded("pool", seed, first).shuffle(groups)
    return [collate(group, tokenizer.pad_id) for group in groups], first + len(rows)
