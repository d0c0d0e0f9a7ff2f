"""Where a trained model keeps a fact in two languages, and a sum: denoising restores it there and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

from workbench.chat import Message, render_tokens
from workbench.experiments.metrics import Metric, logit_difference
from workbench.experiments.pairs import Pairs
from workbench.experiments.patching import patch
from workbench.models import Llama

CAPITALS = (
    ("日本", "東京", "Japan", "Tokyo"),
    ("フランス", "パリ", "France", "Paris"),
    ("ドイツ", "ベルリン", "Germany", "Berlin"),
    ("イタリア", "ローマ", "Italy", "Rome"),
    ("スペイン", "マドリード", "Spain", "Madrid"),
    ("韓国", "ソウル", "Korea", "Seoul"),
    ("カナダ", "オタワ", "Canada", "Ottawa"),
    ("イラン", "テヘラン", "Iran", "Tehran"),
)
# how the answer begins, up to the capital; in Japanese its first words are given too
ASK = {
    "ja": ("{}の首都はどこですか。", "<|channel|>final<|message|>", "首都は"),
    "en": ("What is the capital of {}?", "<|channel|>analysis<|message|>", ""),
}


def capitals(model: Llama, lang: str) -> tuple[Pairs, Metric]:
    """Chats about a country that is one token and whose capital the model knows, corrupted by asking about the next."""
    tokenizer = model.tokenizer
    question, opening, begun = ASK[lang]
    places = [(row[0], row[1]) if lang == "ja" else (row[2], row[3]) for row in CAPITALS]
    tail = [*tokenizer.to_tokens(opening, bos=False), *(tokenizer.encode_literal(begun) if begun else [])]
    rows = [
        [*render_tokens([Message("user", question.format(c))], tokenizer, effort="low", date="2026-01-01"), *tail]
        for c, _ in places
    ]
    shortest = min(map(len, rows))
    kept = [place for place, row in zip(places, rows, strict=True) if len(row) == shortest]
    asked = torch.tensor([row for row in rows if len(row) == shortest])
    said = model(asked)[:, -1].argmax(-1)  # the first token of a capital
    begins = [tokenizer.to_string([token]).strip() for token in said.tolist()]
    knows = [bool(text) and capital.startswith(text) for text, (_, capital) in zip(begins, kept, strict=True)]
    assert sum(knows) >= 5, "a model that was trained on them"
    clean, answers = asked[knows], said[knows]
    pairs = Pairs(clean, clean.roll(1, 0))
    subject = changed_column(pairs)
    # what comes before the subject is the same in both versions: one place there stands for all
    positions = {pos: [pos] * len(clean) for pos in (subject - 1, *range(subject, clean.shape[1]))}
    return replace(pairs, positions=positions), logit_difference(answers, answers.roll(1))


def sums(model: Llama) -> tuple[Pairs, Metric]:
    """Sums of one digit that the model gets right, corrupted by another first number."""
    tokenizer = model.tokenizer
    numbers = [(a, b, a + 2 if a + 2 + b < 10 else a - 2) for a in range(1, 8) for b in range(1, 9 - a, 2)]
    chosen = [(a, b, other) for a, b, other in numbers if other > 0]

    def tokens(a: int, b: int) -> list[int]:
        return [tokenizer.bos_id, *tokenizer.encode_literal(f"{a} + {b} = ")]

    def ids(totals: list[int]) -> Tensor:
        return torch.tensor([tokenizer.encode_literal(str(total))[-1] for total in totals])

    clean = torch.tensor([tokens(a, b) for a, b, _ in chosen])
    corrupt = torch.tensor([tokens(other, b) for _, b, other in chosen])
    right, wrong = ids([a + b for a, b, _ in chosen]), ids([other + b for _, b, other in chosen])
    knows = (model(clean)[:, -1].argmax(-1) == right) & (model(corrupt)[:, -1].argmax(-1) == wrong)
    assert int(knows.sum()) >= 6, "a model that was trained on them"
    return Pairs(clean[knows], corrupt[knows]), logit_difference(right[knows], wrong[knows])


def changed_column(pairs: Pairs) -> int:
    (column,) = (pairs.clean != pairs.corrupt).any(0).nonzero().flatten().tolist()
    return int(column)


def means(
    model: Llama, pairs: Pairs, metric: Metric, **options: Any
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Of the stream after each layer: at the token that changed, at the last one, and elsewhere."""
    table = patch(model, pairs, metric, "resid_post", progress=False, **options).mean("recovered", by=["layer", "pos"])
    changed, last = pl.col("pos") == changed_column(pairs), pl.col("pos") == pairs.n_pos - 1
    return table.filter(changed).sort("layer"), table.filter(last).sort("layer"), table.filter(~changed & ~last)


def random_sites(elsewhere: pl.DataFrame) -> pl.Series:
    return elsewhere.sort("layer", "pos").sample(12, seed=0)["mean"].abs()


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("lang", ["ja", "en"])
def test_a_fact_is_at_its_subject_until_it_is_at_the_end(nano: Llama, lang: str) -> None:
    """Which layer moves it is the model's affair; that it is at one of the two places, and nowhere else, is not."""
    pairs, metric = capitals(nano, lang)
    subject, end, elsewhere = means(nano, pairs, metric)
    early = subject.filter(pl.col("layer") < nano.cfg.n_layers // 2)
    best = early.row(early["mean"].arg_max(), named=True)
    assert best["mean"] >= 0.85, early
    assert best["low"] > 0.7, "over the pairs too"
    assert end["mean"][-1] == pytest.approx(1, abs=1e-3)
    assert end["mean"][0] < 0.2, "not yet"
    assert subject["mean"][0] > subject["mean"][-1], "no longer"
    assert random_sites(elsewhere).mean() < 0.03, "a random site restores nothing"
    assert random_sites(elsewhere).max() < 0.15


@torch.no_grad()
@pytest.mark.slow
def test_noising_the_subject_destroys_the_fact(nano: Llama) -> None:
    pairs, metric = capitals(nano, "en")
    subject, _, elsewhere = means(nano, pairs, metric, direction="noise")
    assert subject["mean"].min() < 0.1
    assert random_sites(elsewhere).min() > 0.85


@torch.no_grad()
@pytest.mark.slow
def test_a_sum_moves_from_its_number_to_the_end(nano: Llama) -> None:
    pairs, metric = sums(nano)
    number, end, elsewhere = means(nano, pairs, metric)
    inner = slice(0, nano.cfg.n_layers - 1)  # after the last layer the end is all there is
    assert max(number["mean"][inner].max(), end["mean"][inner].max()) >= 0.6  # it is partly at both
    assert end["mean"][-1] == pytest.approx(1, abs=1e-3)
    assert number["mean"][0] > 0.5 > end["mean"][0]
    assert number["mean"][nano.cfg.n_layers - 2] < 0.5 < end["mean"][nano.cfg.n_layers - 2]
    assert random_sites(elsewhere).mean() < 0.05, "a random site restores nothing"
