"""The position map between languages is monotone, complete in its gaps, and finds what corresponds."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.chat.render import render_tokens
from workbench.errors import ShapeError
from workbench.experiments.alignment import KINDS, align, common_positions
from workbench.experiments.attribution import attribution_patching
from workbench.experiments.metrics import logit_difference
from workbench.experiments.pairs import Pairs
from workbench.experiments.patching import patch
from workbench.io.prompts import load_prompts, parallel_pairs


def chat(text, tokenizer):
    return render_tokens([{"role": "user", "content": text}], tokenizer, effort="low", date="2026-01-01")


def check(alignment):
    for one, other in zip(alignment.matches, alignment.matches[1:], strict=False):
        assert one.first < other.first
        assert one.second < other.second
    assert {match.kind for match in alignment.matches} <= set(KINDS)
    lone_first, lone_second = alignment.unaligned
    assert sorted(lone_first + [m.first for m in alignment.matches]) == list(range(len(alignment.first)))
    assert sorted(lone_second + [m.second for m in alignment.matches]) == list(range(len(alignment.second)))
    assert len(alignment.frame()) == len(alignment.matches) + len(lone_first) + len(lone_second)


def test_scaffolding_numbers_and_ends_correspond(nano):
    tokenizer = nano.tokenizer
    ids = chat("27足す45はいくつですか。", tokenizer), chat("What is 27 plus 45?", tokenizer)
    alignment = align(*ids, tokenizer)
    check(alignment)
    control = [m for m in alignment.matches if m.kind == "control"]
    assert all(ids[0][m.first] == ids[1][m.second] for m in control)
    shared = [
        alignment.tokens[1][m.second].strip() for m in alignment.matches if m.kind == "shared" and m.label[7:].isdigit()
    ]
    assert "".join(shared).endswith("2745")
    (end,) = (m for m in alignment.matches if m.label.startswith("end user"))
    assert (alignment.tokens[0][end.first], alignment.tokens[1][end.second]) == ("。", "?")
    assert (len(ids[0]) - 1, len(ids[1]) - 1) == (control[-1].first, control[-1].second)


def test_given_spans_correspond_by_their_last_tokens(nano):
    tokenizer = nano.tokenizer
    ids = chat("フランスの首都はどこですか。", tokenizer), chat("What is the capital of France?", tokenizer)
    plain, named = align(*ids, tokenizer), align(*ids, tokenizer, given=[("フランス", "France")])
    check(named)
    assert not any(m.kind == "given" for m in plain.matches)
    (match,) = (m for m in named.matches if m.kind == "given")
    assert named.tokens[0][match.first].endswith("ス")
    assert named.tokens[1][match.second].strip().endswith("ce")
    row = named.frame().row(by_predicate=(pl.col("label") == "given 0"), named=True)
    assert (row["first"], row["second"]) == (match.first, match.second)


def test_crossing_and_missing_places_are_refused(nano):
    tokenizer = nano.tokenizer
    ids = chat("フランスの首都はどこですか。", tokenizer), chat("What is the capital of France?", tokenizer)
    with pytest.raises(ShapeError, match="crossing"):
        align(*ids, tokenizer, given=[("フランス", "France"), ("首都", "capital")])
    with pytest.raises(ShapeError, match="got none"):
        align(*ids, tokenizer, given=[("ドイツ", "France")])
    with pytest.raises(ShapeError, match="got several"):
        align(*ids, tokenizer, given=[("フランス", "a")])


def test_all_bundled_parallel_prompts_align_at_the_same_places(nano):
    tokenizer = nano.tokenizer
    pairs = parallel_pairs(load_prompts())[:60]
    alignments = [align(*(chat(prompt.text, tokenizer) for prompt in pair), tokenizer) for pair in pairs]
    for alignment in alignments:
        check(alignment)
    places = common_positions(alignments)
    assert any(label.startswith("control") for label in places)
    for positions in places.values():
        assert len(positions) == len(pairs)
    last = max(places, key=lambda label: places[label][0][0])
    assert places[last] == [(len(one.first) - 1, len(one.second) - 1) for one in alignments]


def test_a_prompt_aligns_with_itself_everywhere_but_in_plain_words(nano):
    ids = chat("What is 12 plus 30?", nano.tokenizer)
    alignment = align(ids, ids, nano.tokenizer)
    check(alignment)
    assert all(match.first == match.second for match in alignment.matches)


def left_padded(rows, width):
    tokens = torch.tensor([[4] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask


@torch.no_grad()
def test_an_english_subject_patched_into_a_japanese_prompt_moves_it_to_its_japanese_answer(nano):
    """Prompts of different length and language, moved along the map: the subject carries, other places do not."""
    encode = nano.tokenizer.to_tokens
    rows = [("日本", "Japan"), ("フランス", "France"), ("イタリア", "Italy"), ("エジプト", "Egypt")]
    others = rows[1:] + rows[:1]
    english = [encode(f"The capital of {name} is", bos=True) for _, name in rows]
    japanese = [encode(f"{name}の首都は", bos=True) for name, _ in others]
    alignments = [
        align(one, other, nano.tokenizer, given=[(clean, corrupt)])
        for one, other, (_, clean), (corrupt, _) in zip(english, japanese, rows, others, strict=True)
    ]
    width = max(map(len, english + japanese)) + 1
    (clean, clean_mask), (corrupt, corrupt_mask) = left_padded(english, width), left_padded(japanese, width)
    theirs = nano(corrupt, corrupt_mask)[:, -1].argmax(-1)
    pairs = Pairs(clean, corrupt, clean_mask, common_positions(alignments), corrupt_mask=corrupt_mask)
    metric = logit_difference(theirs.roll(1), theirs)  # the Japanese name of the English prompt's capital
    frame = patch(nano, pairs, metric, "resid_pre", layers=[1], progress=False).frame
    unpatched = pl.Series(metric(nano(corrupt, corrupt_mask)).tolist())
    gains = {label: part["value"].cast(pl.Float64) - unpatched for (label,), part in frame.group_by("pos")}
    assert (gains["given 0"] > 0).all(), "towards the other capital, in every pair"
    assert gains["given 0"].mean() > 0.3 * unpatched.abs().mean(), "and far"
    assert gains["end plain 0"].mean() < 0.3 * gains["given 0"].mean()
    assert gains["control 0"].abs().max() < 1e-3
    estimates = attribution_patching(nano, pairs, metric, kinds=["node"], exact_sample=0).frame
    mapped = {
        (str(pair), int(column)) for _, columns in pairs.columns().values() for pair, column in enumerate(columns)
    }
    there = pl.struct("pair", "pos").map_elements(lambda at: (at["pair"], at["pos"]) in mapped, return_dtype=pl.Boolean)
    assert (estimates.filter(~there)["value"] == 0).all()
    assert estimates.filter(there)["value"].abs().max() > 0
    with pytest.raises(ShapeError, match="all_positions"):
        patch(nano, pairs, metric, all_positions=True)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2815), max_size=25), st.lists(st.integers(0, 2815), max_size=25))
def test_any_two_sequences_align_monotonically(nano, first, second):
    check(align(first, second, nano.tokenizer))
