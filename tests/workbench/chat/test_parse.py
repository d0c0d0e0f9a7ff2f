"""Ids back to messages: the inverse of rendering, on whole conversations, cut ones and arbitrary ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conversations import conversations, rendering_options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_files import released_tokenizer, small_tokenizer

from workbench.axes import SEGMENTS
from workbench.chat import Message, ParsedMessage, label_tokens, parse, render_tokens
from workbench.chat.tool_text import to_json
from workbench.errors import TokenizerError
from workbench.io.tokens import Tokenizer

SMALL = small_tokenizer()
arbitrary_ids = st.lists(
    st.integers(0, SMALL.d_vocab - 1) | st.sampled_from([1, 2, 4, 8, 9, 10, 11, 12, 13]), max_size=40
)
Fields = tuple[str | None, str | None, str | None, str | None, str, str]


def fields(message: ParsedMessage) -> Fields:
    return message.role, message.channel, message.recipient, message.constrain, message.content, message.end


def ids_of(text: str, bos: bool = False, tokenizer: Tokenizer = SMALL) -> list[int]:
    return tokenizer.to_tokens(text, bos=bos)


def expected_turns(messages: list[dict[str, Any]], prompt: bool) -> list[Fields]:
    """What a conversation says, stated apart from the renderer, for dialect 1.1."""
    said: list[Fields] = []
    names: list[str] = []
    for position, turn in enumerate(messages):
        last = position == len(messages) - 1 and not prompt
        if turn["role"] == "user":
            said.append(("user", None, None, None, turn["content"], "end"))
        elif turn["role"] == "tool":
            said.append((f"functions.{names.pop(0)}", "commentary", "assistant", None, to_json(turn["content"]), "end"))
        elif "tool_calls" in turn:
            answered = any(m["role"] == "assistant" and "tool_calls" not in m for m in messages[position + 1 : -1])
            if turn.get("thinking") and not answered:
                said.append(("assistant", "analysis", None, None, turn["thinking"], "end"))
            for call in (entry["function"] for entry in turn["tool_calls"]):
                text = call["arguments"] if isinstance(call["arguments"], str) else to_json(call["arguments"])
                said.append(("assistant", "commentary", f"functions.{call['name']}", "json", text, "end"))
                names.append(call["name"])
            said[-1] = (*said[-1][:-1], "call")
        else:
            if last and "thinking" in turn:
                said.append(("assistant", "analysis", None, None, turn["thinking"], "end"))
            said.append(("assistant", "final", None, None, turn["content"], "return" if last else "end"))
    return said


@given(conversations, rendering_options)
@settings(deadline=None, derandomize=True, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
def test_parsing_is_the_inverse_of_rendering(messages: list[dict[str, Any]], options: dict[str, Any]) -> None:
    system, *said = parse(render_tokens(messages, SMALL, **options), SMALL)
    assert system.role == "system"
    if options["add_generation_prompt"]:
        assert fields(said.pop()) == ("assistant", None, None, None, "", "truncated")
    turns = messages
    if messages[0]["role"] != "user":
        instructions, *turns = messages
        if instructions["content"]:
            assert f"# Instructions\n\n{instructions['content']}\n\n" in said[0].content
    if said and said[0].role == "developer":
        del said[0]
    assert [fields(message) for message in said] == expected_turns(turns, options["add_generation_prompt"])


@given(conversations, rendering_options)
@settings(deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
def test_explicit_messages_come_back_as_they_were(messages: list[dict[str, Any]], options: dict[str, Any]) -> None:
    said = [m for m in parse(render_tokens(messages, SMALL, **options), SMALL) if m.channel and m.end != "truncated"]
    again = [Message(m.role or "", m.content, m.channel, m.recipient, m.constrain, end=m.end) for m in said]
    if again:
        _, *parsed = parse(render_tokens(again, SMALL, add_generation_prompt=False), SMALL)
        assert [fields(m) for m in parsed] == [fields(m) for m in said]


def check_spans(ids: list[int]) -> list[ParsedMessage]:
    messages = parse(ids, SMALL)
    assert [position for message in messages for position in message.span] == list(range(len(ids)))
    for message in messages:
        closing = [] if message.end in ("truncated", "outside") else [message.span.stop - 1]
        assert [*message.header, *message.content_span, *closing] == list(message.span)
    return messages


@given(arbitrary_ids)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_arbitrary_ids_parse_into_gapless_spans(ids: list[int]) -> None:
    messages = check_spans(ids)
    labels = label_tokens(ids, SMALL)
    assert len(labels) == len(ids)
    assert set(labels) <= set(SEGMENTS)
    for message in messages:
        for position in message.span:
            special = SMALL.is_special(ids[position])
            inside = position in message.content_span and not special
            expected = message.segment if inside else "control"
            is_bos = message.end == "outside" and ids[position] == SMALL.bos_id
            assert labels[position] == ("bos" if is_bos else expected)


@given(conversations, rendering_options, st.data())
@settings(deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_a_cut_changes_only_the_message_it_hits(
    messages: list[dict[str, Any]], options: dict[str, Any], data: st.DataObject
) -> None:
    ids = render_tokens(messages, SMALL, **options)
    cut = data.draw(st.integers(1, len(ids)))
    whole, part = parse(ids, SMALL), check_spans(ids[:cut])
    assert part[:-1] == whole[: len(part) - 1]
    assert part[-1] == whole[len(part) - 1] or part[-1].end == "truncated"
    assert label_tokens(ids[:cut], SMALL)[: part[-1].span.start] == label_tokens(ids, SMALL)[: part[-1].span.start]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|start|>", (None, None, None, None, "", "truncated")),
        ("<|start|>assistant", ("assistant", None, None, None, "", "truncated")),
        ("<|start|>assistant<|channel|>ana", ("assistant", "ana", None, None, "", "truncated")),
        (
            "<|start|>assistant<|channel|>analysis<|message|>the w",
            ("assistant", "analysis", None, None, "the w", "truncated"),
        ),
        ("<|start|>assistant<|end|>", ("assistant", None, None, None, "", "end")),
        ("<|channel|>final<|message|>東京<|return|>", (None, "final", None, None, "東京", "return")),
        ("<|message|> x<|end|>", (None, None, None, None, " x", "end")),
        (
            "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
            ("assistant", "commentary", "functions.f", "json", "{}", "call"),
        ),
        (
            "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>",
            ("assistant", "commentary", "functions.f", "json", "{}", "call"),
        ),
        ("<|start|>assistant to=<|message|>", ("assistant", None, None, None, "", "truncated")),
        ("the world<|end|>", (None, None, None, None, "the world", "outside")),
    ],
)
def test_single_messages(text: str, expected: Fields) -> None:
    (message,) = parse(ids_of(text), SMALL)
    assert fields(message) == expected


def test_a_header_inside_content_begins_a_new_message() -> None:
    text = "<|start|>assistant<|channel|>analysis<|message|>a<|channel|>final<|message|>b<|start|>user<|message|>c"
    said = [(m.role, m.channel, m.content, m.end) for m in parse(ids_of(text), SMALL)]
    assert said == [
        ("assistant", "analysis", "a", "truncated"),
        (None, "final", "b", "truncated"),
        ("user", None, "c", "truncated"),
    ]


def test_text_around_messages_is_reported_as_outside() -> None:
    ids = [4, 4, *ids_of("the<|start|>user<|message|>a<|end|>", bos=True), *ids_of(" world"), 4]
    first, user, last = check_spans(ids)
    assert (first.end, first.content, user.end, last.end, last.content) == (
        "outside",
        "the",
        "end",
        "outside",
        " world",
    )


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(TokenizerError, match="token id: expected"):
        parse([10, 10**6], SMALL)
    assert parse([], SMALL) == []
    assert label_tokens([], SMALL) == []


def test_ids_may_come_one_by_one() -> None:
    ids = ids_of("<|start|>user<|message|>the<|end|>", bos=True)
    assert label_tokens(iter(ids), SMALL) == label_tokens(ids, SMALL)
    assert parse(iter(ids), SMALL) == parse(ids, SMALL)
    with pytest.raises(TokenizerError, match="token ids: expected a flat list of integers"):
        label_tokens(None, SMALL)  # type: ignore[arg-type]


def labelled(text: str, **options: bool) -> list[tuple[str, str]]:
    ids = ids_of(text, **options)
    return list(zip(SMALL.to_str_tokens(ids), label_tokens(ids, SMALL), strict=True))


def test_labels_of_a_document() -> None:
    labels = labelled("日本の首都", bos=True)
    assert [label for _, label in labels] == ["bos", *["plain"] * (len(labels) - 1)]
    assert label_tokens([*ids_of("a"), SMALL.eos_id, SMALL.pad_id], SMALL)[-2:] == ["control", "control"]


@pytest.mark.parametrize(
    ("header", "segment"),
    [
        ("<|start|>system", "system"),
        ("<|start|>developer", "developer"),
        ("<|start|>user", "user"),
        ("<|start|>assistant<|channel|>analysis", "analysis"),
        ("<|start|>assistant<|channel|>final", "final"),
        ("<|start|>assistant to=functions.f<|channel|>commentary <|constrain|> json", "commentary"),
        ("<|start|>functions.f to=assistant<|channel|>commentary", "tool"),
        ("<|start|>python to=assistant<|channel|>commentary", "tool"),
        ("<|start|>tool", "tool"),
        ("<|channel|>final", "final"),
        ("<|start|>assistant", "plain"),
        ("<|start|>assistant<|channel|>thoughts", "plain"),
        ("<|start|>wizard<|channel|>final", "plain"),
    ],
)
def test_labels_of_a_message(header: str, segment: str) -> None:
    ids = ids_of(f"{header}<|message|>the world<|end|>")
    header_length = ids.index(SMALL.message_id) + 1
    assert label_tokens(ids, SMALL) == ["control"] * header_length + [segment] * (len(ids) - header_length - 1) + [
        "control"
    ]


def test_a_special_token_inside_content_is_control_and_part_of_the_text() -> None:
    ids = [*ids_of("<|start|>user<|message|>a"), 14, *ids_of("b<|end|>")]
    (message,) = parse(ids, SMALL)
    assert message.content == "a<|reserved_006|>b"
    assert label_tokens(ids, SMALL)[-5:] == ["user", "user", "control", "user", "user", "control"][-5:]


@pytest.mark.shared
def test_the_released_tokenizer_round_trips_a_conversation(shared_tokenizer_dir: Path) -> None:
    tokenizer = released_tokenizer(shared_tokenizer_dir)
    messages = [Message("user", " <|end|>𓆏\n"), Message("assistant", "東京です。", thinking="首都は<0x41>?")]
    ids = render_tokens(messages, tokenizer, add_generation_prompt=False)
    said = [(m.role, m.channel, m.content) for m in parse(ids, tokenizer)[1:]]
    assert said == [
        ("user", None, " <|end|>𓆏\n"),
        ("assistant", "analysis", "首都は<0x41>?"),
        ("assistant", "final", "東京です。"),
    ]
    assert set(label_tokens(ids, tokenizer)) == {"system", "user", "analysis", "final", "control"}
