"""Where a trained model keeps a fact in two languages, and a sum: denoising restores it there and nowhere else."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from torch import Tensor

from workbench.chat import Message, render_tokens
from workbench.experiments.metrics import logit_difference
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


def capitals(model: Llama, lang: str) -> tuple[Pairs, object]:
    """Chats about a country, corrupted by asking about the next one in the list."""
    tokenizer = model.tokenizer
    question, opening, begun = ASK[lang]
    places = [(row[0], row[1]) if lang == "ja" else (row[2], row[3]) for row in CAPITALS]
    tail = [*tokenizer.to_tokens(opening, bos=False), *(tokenizer.encode_literal(begun) if begun else [])]
    rows = [
        [*render_tokens([Message("user", question.format(c))], tokenizer, effort="low", date="2026-01-01"), *tail]
        for c, _ in places
    ]
    clean = torch.tensor(rows)
    corrupt = clean.roll(1, 0)
    answers = torch.tensor([tokenizer.encode_literal(capital)[-1] for _, capital in places])
    assert torch.equal(model(clean)[:, -1].argmax(-1), answers), "the model knows them all"
    subject = changed_column(Pairs(clean, corrupt))
    # what comes before the subject is the same in both versions: one place there stands for all
    positions = {pos: [pos] * len(rows) for pos in (subject - 1, *range(subject, clean.shape[1]))}
    pairs = Pairs(clean, corrupt, positions=positions, names=[c for c, _ in places])
    return pairs, logit_difference(answers, answers.roll(1))


def sums(model: Llama) -> tuple[Pairs, object]:
    """Sums of one digit, corrupted by another first number."""
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
    assert torch.equal(model(clean)[:, -1].argmax(-1), right)
    assert torch.equal(model(corrupt)[:, -1].argmax(-1), wrong)
    return Pairs(clean, corrupt, names=[f"{a}+{b}" for a, b, _ in chosen]), logit_difference(right, wrong)


def changed_column(pairs: Pairs) -> int:
    (column,) = (pairs.clean != pairs.corrupt).any(0).nonzero().flatten().tolist()
    return int(column)


def means(model: Llama, pairs: Pairs, metric: object, component: str, **options: object) -> pl.DataFrame:
    result = patch(model, pairs, metric, component, progress=False, **options)  # type: ignore[arg-type]
    return result.mean("recovered", by=["layer", "pos"])


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("lang", ["ja", "en"])
def test_a_fact_is_at_its_subject_until_the_last_layers(nano: Llama, lang: str) -> None:
    """Layers 0 to 2: the country's token alone restores the capital. After layer 4 the answer is at the last token."""
    pairs, metric = capitals(nano, lang)
    subject, last = changed_column(pairs), pairs.n_pos - 1
    table = means(nano, pairs, metric, "resid_post")
    at_subject = table.filter((pl.col("pos") == subject) & (pl.col("layer") <= 2))
    assert (at_subject["mean"] >= 0.9).all(), at_subject
    assert (at_subject["low"] > 0.8).all(), "over the pairs too"
    end = table.filter((pl.col("pos") == last) & (pl.col("layer") == 5))
    assert end["mean"].item() == pytest.approx(1, abs=1e-4)
    assert table.filter((pl.col("pos") == last) & (pl.col("layer") <= 2))["mean"].max() < 0.12, "not yet"
    elsewhere = table.filter(~pl.col("pos").is_in([subject, last]))
    assert len(elsewhere) == 6 * (pairs.n_pos - subject - 1)
    assert elsewhere["mean"].abs().max() < 0.03, "no other site carries it"
    random = elsewhere.filter(pl.col("pos") > subject).sample(12, seed=0)
    assert random["mean"].abs().max() < 0.03


@torch.no_grad()
@pytest.mark.slow
def test_noising_the_subject_destroys_the_fact(nano: Llama) -> None:
    pairs, metric = capitals(nano, "en")
    subject = changed_column(pairs)
    table = means(nano, pairs, metric, "resid_post", direction="noise", layers=[1, 2])
    assert (table.filter(pl.col("pos") == subject)["mean"] < 0.1).all()
    assert (table.filter((pl.col("pos") > subject) & (pl.col("pos") < pairs.n_pos - 1))["mean"] > 0.97).all()


@torch.no_grad()
@pytest.mark.slow
def test_a_sum_moves_from_its_number_to_the_end(nano: Llama) -> None:
    pairs, metric = sums(nano)
    number, last = changed_column(pairs), pairs.n_pos - 1
    table = means(nano, pairs, metric, "resid_post")
    at = {(layer, pos): mean for layer, pos, mean, *_ in table.iter_rows()}
    assert at[4, last] >= 0.9
    assert at[5, last] == pytest.approx(1, abs=1e-4)
    assert at[0, number] > 0.75
    assert at[4, number] < 0.03, "by then it has left the number"
    elsewhere = table.filter(~pl.col("pos").is_in([number, last]))
    assert elsewhere["mean"].abs().max() < 0.05, elsewhere.sort("mean")
