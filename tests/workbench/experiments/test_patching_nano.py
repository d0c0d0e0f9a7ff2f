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
    return name_places(pairs, range(subject - 1, clean.shape[1])), logit_difference(answers, answers.roll(1))


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
    pairs = Pairs(clean[knows], corrupt[knows])
    return name_places(pairs, range(pairs.n_pos), tail=("added", "equals", "last")), logit_difference(
        right[knows], wrong[knows]
    )


def changed_column(pairs: Pairs) -> int:
    (column,) = (pairs.clean != pairs.corrupt).any(0).nonzero().flatten().tolist()
    return int(column)


def name_places(pairs: Pairs, columns: range, tail: tuple[str, ...] = ("last",)) -> Pairs:
    """The token that changed, the last ones by their names in `tail`, and the others by their number."""
    names = {changed_column(pairs): "changed"} | {pairs.n_pos - len(tail) + n: name for n, name in enumerate(tail)}
    return replace(pairs, positions={names.get(pos, str(pos)): [pos] * pairs.n_pairs for pos in columns})


FACT_PLACES = ["changed", "last"]
SUM_PLACES = ["changed", "added", "equals", "last"]  # both numbers, the sign, and the space where the answer is due


def means(model: Llama, pairs: Pairs, metric: Metric, places: list[str], **options: Any) -> dict[str, pl.DataFrame]:
    """Of the stream after each layer: at each of `places` alone, at all of them at once ("right"), and elsewhere."""
    result = patch(model, pairs, metric, "resid_post", together={"right": places}, progress=False, **options)
    table = result.mean("recovered", by=["layer", "pos"]).sort("layer")
    found = {pos: table.filter(pl.col("pos") == pos) for pos in (*places, "right")}
    return found | {"elsewhere": table.filter(~pl.col("pos").is_in(list(found)))}


def random_sites(elsewhere: pl.DataFrame) -> pl.Series:
    return elsewhere.sort("layer", "pos").sample(12, seed=0)["mean"].abs()


def assert_it_is_there_and_nowhere_else(found: dict[str, pl.DataFrame], n_layers: int) -> None:
    """The answer goes from the token it is about to the end; how fast, layer by layer, is the model's affair."""
    changed, last, right = (found[pos]["mean"] for pos in ("changed", "last", "right"))
    assert right.min() >= 0.9, "these places hold the answer, in every layer"
    assert found["right"]["low"].min() >= 0.85, "over the pairs too"
    assert changed[0] > 3 * abs(last[0]), "most of it is at the token"
    assert last[n_layers - 1] == pytest.approx(1, abs=1e-3)
    assert abs(changed[n_layers - 1]) < 1e-3, "no longer"
    assert random_sites(found["elsewhere"]).mean() < 0.05, "a random site restores nothing"
    assert found["elsewhere"]["mean"].abs().median() < 0.01, "nor do most sites, looked at one by one"


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("lang", ["ja", "en"])
def test_a_fact_goes_from_its_subject_to_the_end(nano: Llama, lang: str) -> None:
    found = means(nano, *capitals(nano, lang), FACT_PLACES)
    assert_it_is_there_and_nowhere_else(found, nano.cfg.n_layers)
    assert found["changed"]["mean"][0] > 0.85, "nearly all of it is still at the subject"
    assert found["last"]["mean"][0] < 0.1, "not yet at the end"


@torch.no_grad()
@pytest.mark.slow
def test_noising_the_subject_destroys_the_fact(nano: Llama) -> None:
    found = means(nano, *capitals(nano, "en"), FACT_PLACES, direction="noise")
    assert found["changed"]["mean"].min() < 0.1
    assert found["right"]["mean"][1:].max() < 0.1
    assert random_sites(found["elsewhere"]).min() > 0.85


@torch.no_grad()
@pytest.mark.slow
def test_a_sum_goes_from_its_number_to_the_end(nano: Llama) -> None:
    found = means(nano, *sums(nano), SUM_PLACES)
    assert_it_is_there_and_nowhere_else(found, nano.cfg.n_layers)
    alone = pl.concat([found[pos].select("layer", "mean", pos=pl.lit(pos)) for pos in SUM_PLACES])
    assert alone.group_by("layer").agg(pl.col("mean").max())["mean"].min() < 0.5, "no place alone holds it all the way"
