"""What clients are shown of an answer's ids: the channels of Harmony, and the same whole as `chat.parse` finds."""

from __future__ import annotations

import random

import pytest

from workbench.chat import parse
from workbench.io.tokens import Tokenizer
from workbench.models import Llama
from workbench.serve.answer import Channels, Text, join

CALL = ' to=functions.weather<|channel|>commentary <|constrain|> json<|message|>{"city": "東京"}<|call|>'
THOUGHT = "<|channel|>analysis<|message|>2足す3は5です。<|end|><|start|>assistant"
ANSWER = "<|channel|>final<|message|>答えは𠮷です。\nEnd<|return|>"


@pytest.fixture
def tokenizer(tiny_llama: Llama) -> Tokenizer:
    return tiny_llama.tokenizer


def read(tokenizer: Tokenizer, text: str, stops: tuple[str, ...] = ()) -> tuple[dict, Channels]:
    channels = Channels(tokenizer, stops)
    deltas = []
    for token_id in tokenizer.to_tokens(text, bos=False):
        deltas += channels.push(token_id)
        if channels.stopped:
            break
    return join([*deltas, *channels.finish()]), channels


def test_reasoning_and_answer_come_apart(tokenizer: Tokenizer) -> None:
    found, channels = read(tokenizer, THOUGHT + ANSWER)
    assert found == {"content": "答えは𠮷です。\nEnd", "reasoning": "2足す3は5です。", "calls": []}
    ids = tokenizer.to_tokens("2足す3は5です。", bos=False)
    assert channels.n_reasoning == channels.kinds.count("reasoning") == len(ids)


def test_a_tool_call_has_name_and_arguments(tokenizer: Tokenizer) -> None:
    found, channels = read(tokenizer, THOUGHT + CALL)
    assert found["calls"] == [{"name": "weather", "arguments": '{"city": "東京"}'}]
    assert found["content"] == ""
    assert channels.n_calls == 1


def test_the_recipient_may_follow_the_channel_and_calls_may_be_several(tokenizer: Tokenizer) -> None:
    first = "<|channel|>commentary to=functions.one json<|message|>{}<|end|><|start|>assistant"
    found, _ = read(tokenizer, first + CALL)
    assert [call["name"] for call in found["calls"]] == ["one", "weather"]


def test_a_preamble_is_content_and_another_role_is_not_shown(tokenizer: Tokenizer) -> None:
    text = (
        "<|channel|>commentary<|message|>調べます。<|end|><|start|>user<|message|>嘘<|end|><|start|>assistant" + ANSWER
    )
    found, _ = read(tokenizer, text)
    assert found["content"] == "調べます。答えは𠮷です。\nEnd"


def test_stop_strings_are_looked_for_in_the_content_alone(tokenizer: Tokenizer) -> None:
    found, channels = read(tokenizer, THOUGHT + ANSWER, stops=("です",))
    assert (found["content"], found["reasoning"]) == ("答えは𠮷", "2足す3は5です。")
    assert channels.stopped


def test_an_unfinished_character_shows_as_such(tokenizer: Tokenizer) -> None:
    ids = tokenizer.to_tokens("<|channel|>final<|message|>𠮷", bos=False)[:-2]
    channels = Channels(tokenizer)
    deltas = [delta for token_id in ids for delta in channels.push(token_id)]
    assert join([*deltas, *channels.finish()])["content"] == "\ufffd"


def test_any_ids_give_what_parse_finds_in_them(tokenizer: Tokenizer) -> None:
    draw = random.Random(5)
    brackets = [tokenizer.start_id, tokenizer.channel_id, tokenizer.message_id, tokenizer.end_id]
    words = [*tokenizer.to_tokens("assistant analysis final commentary user to=functions.f", bos=False)]
    before = tokenizer.to_tokens("<|start|>assistant", bos=False)
    for _ in range(200):
        ids = [draw.choice(draw.choice([brackets, words, range(352, 1200)])) for _ in range(40)]
        channels = Channels(tokenizer)
        deltas = [delta for token_id in ids for delta in channels.push(token_id)]
        found = join([*deltas, *channels.finish()])
        shown = [m for m in parse([*before, *ids], tokenizer) if m.end != "outside" and m.content_span]
        mine = [
            m
            for m in shown
            if m.role in ("assistant", None) and tokenizer.message_id in [*before, *ids][m.header.start : m.header.stop]
        ]
        assert found["reasoning"] == "".join(m.content for m in mine if m.channel == "analysis" and not m.recipient)
        assert found["content"] == "".join(m.content for m in mine if m.channel != "analysis" and not m.recipient)


def test_a_raw_continuation_keeps_its_leading_space_and_names(tokenizer: Tokenizer) -> None:
    ids = tokenizer.to_tokens("Hello world<|end|>", bos=False)
    whole = Text(tokenizer, [tokenizer.bos_id], ())
    assert "".join("".join(whole.push(token_id)) for token_id in ids) == "Hello world<|end|>"
    rest = Text(tokenizer, ids[:1], ())
    shown = "".join("".join(rest.push(token_id)) for token_id in ids[1:])
    assert tokenizer.to_string(ids[:1]) + shown == "Hello world<|end|>"
