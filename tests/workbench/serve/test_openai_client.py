"""The official client against a running server."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
import torch
from serve_running import Running, running

from workbench import load_model
from workbench.chat import render_tokens
from workbench.interventions import KnockOut, to_json
from workbench.models import Llama
from workbench.serve import routing_arrays
from workbench.serve.choice import Choice
from workbench.serve.service import Identity

MESSAGES = [{"role": "user", "content": "東京の天気は？"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALLED = (
    "<|channel|>analysis<|message|>天気を調べる。<|end|><|start|>assistant to=functions.weather<|channel|>commentary "
    '<|constrain|> json<|message|>{"city": "東京"}<|call|>'
)


@pytest.fixture(scope="module")
def server(tiny_moe: Llama) -> Iterator[Running]:
    with running(tiny_moe) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120)


@pytest.fixture
def dictated(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer is CALLED, whatever the random weights say."""
    ids = server.service.tokenizer.to_tokens(CALLED, bos=False)
    monkeypatch.setattr(Choice, "_choose", lambda self, logits: ids[len(self.written)])


def test_models_and_completions(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    answer = client.completions.create(model="tiny", prompt=[[20, 21, 22]], max_tokens=3, logprobs=2, echo=True)
    assert len(answer.choices[0].logprobs.tokens) == 6
    assert answer.usage.total_tokens == 6


@pytest.mark.usefixtures("dictated")
def test_a_tool_call_comes_whole_and_in_pieces(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.reasoning_content == "天気を調べる。"
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "東京"}')
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls[0].function.arguments == call.function.arguments


def test_a_tool_result_is_rendered_after_its_call(server: Running, client: openai.OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "東京"}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "晴れ"},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, max_completion_tokens=1)
    model = server.service.model
    want = render_tokens(
        [
            MESSAGES[0],
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "weather", "content": "晴れ"},
        ],
        model.tokenizer,
        template=model.chat_template,
        tools=TOOLS,
        date="2026-01-01",
    )
    assert answer.usage.prompt_tokens == len(want)


def test_own_fields_go_through_extra_body(client: openai.OpenAI) -> None:
    gone = to_json([KnockOut(experts=(0,), mode="reroute")])
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=4, seed=1,
        extra_body={"intervention": gone, "routing": True, "repetition_penalty": 1.1, "top_k": 20},
    )  # fmt: skip
    record = answer.choices[0].model_extra["routing"]
    ids, weights = routing_arrays(record)
    assert ids.shape == weights.shape == (answer.usage.total_tokens, 2, 2)
    assert not (ids == 0).any()  # the expert that was knocked out


def test_errors_are_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body={"min_p": 0.1})
    assert refused.value.param == "min_p"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


def test_a_failure_after_the_stream_began_reaches_the_reader(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Choice, logits: torch.Tensor) -> int:
        if len(self.written) == 3:
            raise RuntimeError("broken")
        return 40

    monkeypatch.setattr(Choice, "_choose", fails)
    stream = client.completions.create(model="tiny", prompt="x", max_tokens=9, stream=True)
    with pytest.raises(openai.APIError, match="pass failed"):
        list(stream)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nano-moe-thinking", "nano-dense-thinking"])
def test_the_bundled_models_think_and_answer(name: str) -> None:
    model = load_model(name, dtype="float32")
    messages = [{"role": "user", "content": "2足す3はいくつですか。"}]
    with running(model, identity=Identity(name, date="2026-01-01")) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=300)
        answer = client.chat.completions.create(
            model=name, messages=messages, temperature=0, reasoning_effort="medium", max_completion_tokens=150
        )
    prompt = render_tokens(messages, model.tokenizer, template=model.chat_template, date="2026-01-01", effort="medium")
    want = model.generate(torch.tensor([prompt]), max_new_tokens=150).messages()[0]
    message = answer.choices[0].message
    assert message.content == next(m.content for m in want if m.channel == "final")
    assert message.reasoning_content == next(m.content for m in want if m.channel == "analysis")
    assert 0 < answer.usage.completion_tokens_details.reasoning_tokens < answer.usage.completion_tokens
    assert answer.choices[0].finish_reason == "stop"
