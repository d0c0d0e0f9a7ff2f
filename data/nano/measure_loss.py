"""Held-out loss per language, beside a unigram and a bigram model fitted on the training text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from batches import Example, collate, document_example
from generator.documents import document
from generator.parallel import LANGUAGES

from workbench.io.tokens import Tokenizer
from workbench.models import Llama

EVAL_SEED = 7  # documents of this seed with the held-out side of the split were never trained on
N_DOCUMENTS = 400
N_BASELINE_DOCUMENTS = 20_000
BACK_OFF = 5.0  # how many observations the unigram model is worth inside the bigram model

Ids = Sequence[Sequence[int]]


def held_out_documents(tokenizer: Tokenizer) -> dict[str, tuple[list[list[int]], int]]:
    """By language: token ids of held-out documents, and how many characters they hold."""
    documents = [document(EVAL_SEED, index, held_out=True) for index in range(N_DOCUMENTS)]
    return {
        lang: (
            [[*tokenizer.to_tokens(d.text, bos=True), tokenizer.eos_id] for d in documents if d.lang == lang],
            sum(len(d.text) for d in documents if d.lang == lang),
        )
        for lang in LANGUAGES
    }


def unigram_loss(training: Ids, held_out: Ids, d_vocab: int) -> float:
    """Nats per token of add-one smoothed token frequencies."""
    counts = Counter(token for row in training for token in row[1:])
    total = sum(counts.values()) + d_vocab
    tokens = [token for row in held_out for token in row[1:]]
    return -sum(math.log((counts[token] + 1) / total) for token in tokens) / len(tokens)


def bigram_loss(training: Ids, held_out: Ids, d_vocab: int) -> float:
    """Nats per token of bigram frequencies that back off to the unigram model (Dirichlet prior)."""
    pairs = Counter(pair for row in training for pair in pairwise(row))
    firsts = Counter(token for row in training for token in row[:-1])
    counts = Counter(token for row in training for token in row[1:])
    total = sum(counts.values()) + d_vocab
    found = [pair for row in held_out for pair in pairwise(row)]
    nats = 0.0
    for first, second in found:
        prior = (counts[second] + 1) / total
        nats -= math.log((pairs[first, second] + BACK_OFF * prior) / (firsts[first] + BACK_OFF))
    return nats / len(found)


@torch.no_grad()
def model_loss(model: Llama, held_out: Ids, batch: int = 50) -> float:
    """Nats per token of the model."""
    nats, n_tokens = 0.0, 0
    ordered = sorted(held_out, key=len)
    for start in range(0, len(ordered), batch):
        rows = collate([Example(list(row), 1) for row in ordered[start : start + batch]], pad_id=4)
        logits = model(rows.tokens).float()
        targets = rows.targets.flatten()
        nats += F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-1, reduction="sum").item()
        n_tokens += int((targets >= 0).sum())
    return nats / n_tokens


def both_units(nats: float, held_out: Ids, n_characters: int) -> dict[str, float]:
    """A loss in nats per token, and in bits per character, which does not depend on the tokenizer."""
    n_tokens = sum(len(row) - 1 for row in held_out)
    return {"nats_per_token": nats, "bits_per_character": nats * n_tokens / math.log(2) / n_characters}


def baseline_losses(tokenizer: Tokenizer, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """By baseline and language: the loss of both baselines, fitted on the first documents of the training stream."""
    training = [document_example(tokenizer, seed, index).ids for index in range(N_BASELINE_DOCUMENTS)]
    held_out = held_out_documents(tokenizer)
    return {
        name: {
            lang: both_units(loss(training, rows, tokenizer.d_vocab), rows, n) for lang, (rows, n) in held_out.items()
        }
        for name, loss in (("unigram", unigram_loss), ("bigram", bigram_loss))
    }


def model_losses(model: Llama) -> dict[str, dict[str, float]]:
    """By language: the loss of the model."""
    held_out = held_out_documents(model.tokenizer)
    return {lang: both_units(model_loss(model, rows), rows, n) for lang, (rows, n) in held_out.items()}
