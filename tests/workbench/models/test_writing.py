"""Stop strings, streaming, thinking budgets, caches and chunks, on the bundled tokenizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workbench.chat import render
from workbench.errors import ConfigError, ShapeError
from workbench.interventions import AddVector, Where
from workbench.io.tokens import Tokenizer
from workbench.io.weights import load_model
from workbench.models import Llama
from workbench.models.stopping import CLOSING, TextWatch, ThinkingBudget


@pytest.fixture(scope="module")
def nano() -> Llama:
    return load_model("nano-moe-thinking", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(nano: Llama) -> Tokenizer:
    return nano.tokenizer


def left_padded(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    rows = [tokenizer.to_tokens(text, bos=True) for text in texts]
    width = max(map(len, rows))
    tokens = torch.tensor([[4] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask


TEXTS = ["お茶と珈琲とどちらが好きですか。", "The sea is", "2足す3は"]


def test_streamed_pieces_join_to_the_text_and_hold_whole_characters(nano: Llama, tokenizer: Tokenizer) -> None:
    tokens, mask = left_padded(tokenizer, TEXTS)
    pieces: dict[int, list[str]] = {0: [], 1: [], 2: []}
    out = nano.generate(
        tokens, mask, max_new_tokens=40, temperature=1.5, seed=1, on_text=lambda row, text: pieces[row].append(text)
    )
    assert ["".join(parts) for parts in pieces.values()] == out.texts()
    assert [tokenizer.to_string(ids, text_start=False) for ids in out.continuations()] == out.texts()
    assert sum(map(len, pieces.values())) > 20


def test_bytes_of_one_character_are_shown_together(tokenizer: Tokenizer) -> None:
    watch = TextWatch(tokenizer.stream(text_start=False), ())
    ids = tokenizer.encode_literal("𓀀")[-4:]
    assert [watch.push(token_id) for token_id in ids] == ["", "", "", "𓀀"]
    watch.push(ids[0])
    assert watch.finish() == "\N{REPLACEMENT CHARACTER}", "half a character at the end is shown as such, once"


class Letters:
    """A decoder whose tokens are characters."""

    def push(self, token_id: int) -> str:
        return chr(token_id)

    def finish(self) -> str:
        return ""


@pytest.mark.parametrize(
    ("text", "stops", "shown", "n_read"),
    [
        ("hello STOP more", ("STOP",), "hello ", 10),
        ("ab ababac", ("abac",), "ab ab", 9),
        ("aaab", ("aab", "ab"), "a", 4),
        ("xyz", ("yzz",), "xyz", 3),
        ("STOP", ("STOP",), "", 4),
        ("no stop", (), "no stop", 7),
    ],
)
def test_no_part_of_a_stop_string_is_ever_shown(text: str, stops: tuple, shown: str, n_read: int) -> None:
    watch, pieces = TextWatch(Letters(), stops), []
    for character in text:
        pieces.append(watch.push(ord(character)))
        assert not any(stop in "".join(pieces) for stop in stops)
        if watch.stopped:
            break
    assert "".join(pieces) + watch.finish() == shown
    assert len(pieces) == n_read


def test_a_stop_string_ends_its_row_wherever_tokens_begin(nano: Llama, tokenizer: Tokenizer) -> None:
    tokens, mask = left_padded(tokenizer, TEXTS)
    free = nano.generate(tokens, mask, max_new_tokens=30, stop_ids=())
    whole = free.texts()
    stop = whole[0][3:6]  # inside tokens or across them
    out = nano.generate(tokens, mask, max_new_tokens=30, stop_ids=(), stop_strings=[stop])
    for row, text in enumerate(out.texts()):
        assert out.stopped[row] == ("stop_string" if stop in whole[row] else "length")
        assert text == whole[row].split(stop)[0]
    assert out.stopped[0] == "stop_string"
    ids, free_ids = out.continuations()[0], free.continuations()[0]
    assert ids == free_ids[: len(ids)]
    assert stop in tokenizer.to_string(ids, text_start=False)
    assert stop not in tokenizer.to_string(ids[:-1], text_start=False)


PROMPT = render([{"role": "user", "content": "2足す3はいくつですか。"}], date="2026-04-03")


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_a_thinking_budget_closes_the_analysis_and_opens_the_answer(
    nano: Llama, tokenizer: Tokenizer, limit: int
) -> None:
    tokens = torch.tensor([tokenizer.to_tokens(PROMPT, bos=False)])
    free = nano.generate(tokens, max_new_tokens=120).messages()[0]
    thought = next(message for message in free if message.channel == "analysis")
    assert len(thought.content_span) > limit, "the model thinks for longer when left alone"
    out = nano.generate(tokens, max_new_tokens=120, max_thinking_tokens=limit)
    messages = out.messages()[0][2:]
    assert (messages[0].channel, messages[0].end) == ("analysis", "end")
    assert len(messages[0].content_span) == limit
    assert messages[1].channel == "final"
    assert messages[1].content, "the answer is written by the model"
    closing = tokenizer.to_tokens(CLOSING, bos=False)
    ids = out.continuations()[0]
    assert any(ids[start : start + len(closing)] == closing for start in range(len(ids)))
    assert (
        nano.generate(tokens, max_new_tokens=120, max_thinking_tokens=500).continuations()[0]
        == (nano.generate(tokens, max_new_tokens=120).continuations()[0])
    )


def test_a_budget_knows_a_channel_that_the_prompt_opened(tokenizer: Tokenizer) -> None:
    budget = ThinkingBudget(tokenizer, 2)
    budget.see(tokenizer.to_tokens(PROMPT + "<|channel|>analysis<|message|>一二三四", bos=False), written=False)
    assert budget.dictated() is None
    budget.see([500, 501])
    dictated = []
    while (token_id := budget.dictated()) is not None:
        dictated.append(token_id)
        budget.see([token_id])
    assert dictated == tokenizer.to_tokens(CLOSING, bos=False)
    budget.see([500] * 10)
    assert budget.dictated() is None, "the final channel has no budget"


@pytest.mark.parametrize(
    "options", [{"cache": "static"}, {"prefill_chunk": 3}, {"prefill_chunk": 1, "cache": "static"}]
)
def test_caches_and_chunks_change_no_token(nano: Llama, tokenizer: Tokenizer, options: dict) -> None:
    tokens, mask = left_padded(tokenizer, TEXTS)
    expected = nano.generate(tokens, mask, max_new_tokens=20, stop_ids=())
    assert torch.equal(nano.generate(tokens, mask, max_new_tokens=20, stop_ids=(), **options).tokens, expected.tokens)


def test_a_growing_cache_doubles_and_keeps_what_it_holds(model: Llama) -> None:
    small, whole = model.new_cache(2, 60, growing=True), model.new_cache(2, 60)
    small.room = 4
    small.keys = [keys[:, :, :4].clone() for keys in small.keys]
    small.values = [values[:, :, :4].clone() for values in small.values]
    tokens = torch.randint(5, 60, (2, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for start, stop in ((0, 3), (3, 4), (4, 5), (5, 20), (20, 30)):
            grown = model(tokens[:, start:stop], cache=small)
            assert torch.equal(grown, model(tokens[:, start:stop], cache=whole))
    assert small.room == 40
    with pytest.raises(ShapeError, match="cache: expected at most 60 positions, got 63"), torch.no_grad():
        model(torch.full((2, 33), 5), cache=small)


@pytest.mark.parametrize("chunk", [None, 2])
def test_interventions_know_where_the_prompt_ends_when_it_comes_in_chunks(
    nano: Llama, tokenizer: Tokenizer, chunk: int | None
) -> None:
    tokens, mask = left_padded(tokenizer, TEXTS)
    vector = torch.randn(nano.cfg.d_model, generator=torch.Generator().manual_seed(0)) * 20
    steer = AddVector(vector=vector, point="resid_post", where=Where(layers=(2,), phase="decode"))
    expected = nano.generate(tokens, mask, max_new_tokens=8, stop_ids=(), interventions=[steer])
    assert not torch.equal(expected.tokens, nano.generate(tokens, mask, max_new_tokens=8, stop_ids=()).tokens)
    out = nano.generate(tokens, mask, max_new_tokens=8, stop_ids=(), interventions=[steer], prefill_chunk=chunk)
    assert torch.equal(out.tokens, expected.tokens)
    with nano.intervene([steer]):
        around = nano.generate(tokens, mask, max_new_tokens=8, stop_ids=(), prefill_chunk=chunk)
    assert torch.equal(around.tokens, expected.tokens)


def test_sampled_rows_equal_themselves_alone(nano: Llama, tokenizer: Tokenizer) -> None:
    tokens, mask = left_padded(tokenizer, TEXTS)
    seeds = [11, 12, 13]
    options = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2, "max_new_tokens": 25}
    together = nano.generate(tokens, mask, seed=seeds, **options).continuations()
    for row, text in enumerate(TEXTS):
        alone = torch.tensor([tokenizer.to_tokens(text, bos=True)])
        assert nano.generate(alone, seed=[seeds[row]], **options).continuations()[0] == together[row]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cache": "paged"}, ShapeError, "cache: expected growing or static, got 'paged'"),
        ({"prefill_chunk": 0}, ShapeError, "prefill_chunk: expected at least 1"),
        ({"stop_strings": "end"}, ShapeError, "stop_strings: expected a list of strings"),
        ({"stop_strings": [""]}, ShapeError, "stop_strings: expected strings of one character or more"),
        ({"stop_strings": ["end"]}, ConfigError, "stop_strings, on_text: expected a model with a tokenizer"),
        ({"max_thinking_tokens": 3}, ConfigError, "max_thinking_tokens: expected a model with a tokenizer"),
        ({"max_thinking_tokens": -1}, ShapeError, "max_thinking_tokens: expected a whole number from 0"),
    ],
)
def test_options_that_cannot_be_met_are_named(
    llama: Llama, tokens: Tensor, options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        llama.generate(tokens, **{"max_new_tokens": 2, **options})
