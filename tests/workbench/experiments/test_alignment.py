"""The position map between languages is monotone, complete in its gaps, and finds what corresponds."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.chat.render import render_tokens
from workbench.errors import ShapeError
from workbench.experiments.alignment import KINDS, align, common_positions
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


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2815), max_size=25), st.lists(st.integers(0, 2815), max_size=25))
def test_any_two_sequences_align_monotonically(nano, first, second):
    check(align(first, second, nano.tokenizer))
