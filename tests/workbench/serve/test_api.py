"""The HTTP of a server: answers that are the model's own, and refusals that name what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from serve_running import LIMITS, Running, running

from workbench.chat import parse, render_tokens
from workbench.interventions import AddVector, KnockOut, Where, to_json
from workbench.models import Llama
from workbench.models.sampling import row_seeds
from workbench.serve import routing_arrays

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES = [{"role": "user", "content": "2足す3はいくつですか。"}]
IDS = list(range(40, 60))
GONE = KnockOut(experts=(0, 3), mode="reroute", where=Where(layers=(1,)))

FAR = {"kind": "knock_out", "experts": [0], "mode": "drop", "where": {"positions": [10**30]}}
IN_JAPANESE = KnockOut(experts=(1,), mode="drop", where=Where(langs=("ja",)))


@pytest.fixture(scope="module")
def server(tiny_moe: Llama) -> Iterator[Running]:
    with running(tiny_moe) as found:
        yield found


def generated(model: Llama, ids: list[int], n: int, **settings: object) -> list[int]:
    return model.generate(
        torch.tensor([ids]), max_new_tokens=n, prefill_chunk=LIMITS.prefill_chunk, **settings
    ).continuations()[0]


def rendered(model: Llama, messages: list[dict], **settings: object) -> list[int]:
    return render_tokens(messages, model.tokenizer, template=model.chat_template, date="2026-01-01", **settings)


def events(response: object) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_the_model_is_listed(server: Running) -> None:
    with server.client() as client:
        listed = client.get("/v1/models").json()["data"]
        assert [card["id"] for card in listed] == ["tiny"]
        assert client.get("/v1/models/tiny").json() == listed[0]
        assert client.get("/v1/models/other").status_code == 404
        assert listed[0]["max_model_len"] == server.service.model.cfg.n_ctx


def test_a_completion_is_what_generate_writes(server: Running) -> None:
    model = server.service.model
    answer = server.post(TEXT, {"prompt": IDS, "max_tokens": 12, "temperature": 0}).json()
    want = generated(model, IDS, 12)
    assert answer["choices"][0]["text"] == model.tokenizer.to_string(want, text_start=False)
    assert answer["usage"] == {"prompt_tokens": 20, "completion_tokens": len(want), "total_tokens": 20 + len(want)}


def test_too_many_prompts_are_refused_before_they_are_read(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a text was tokenised")

    monkeypatch.setattr(server.service.tokenizer, "to_tokens", never)
    answer = server.post(TEXT, {"prompt": ["a"] * 100, "n": 2})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "n"


def test_an_echo_and_what_follows_share_a_character(server: Running) -> None:
    """A prompt of token ids may end within one; the answer completes it."""
    tokenizer = server.service.model.tokenizer
    *begun, last = tokenizer.to_tokens("a𠮷", bos=False)
    assert tokenizer.is_byte(last), "the character is one token, and the test would look away"
    body = {"prompt": begun, "max_tokens": 1, "temperature": 0, "logit_bias": {str(last): 100.0}}
    assert server.post(TEXT, {**body, "echo": True}).json()["choices"][0]["text"].endswith("a𠮷")
    pieces = events(server.post(TEXT, {**body, "echo": True, "stream": True}))
    assert "".join(piece["choices"][0]["text"] for piece in pieces).endswith("a𠮷")
    cut = server.post(TEXT, {**body, "echo": True, "max_tokens": 0}).json()["choices"][0]["text"]
    assert cut == tokenizer.to_string(begun)


def test_the_token_that_ends_an_answer_is_not_its_text(server: Running) -> None:
    body = {"prompt": IDS, "max_tokens": 5, "temperature": 0, "logit_bias": {"2": 100.0}}
    answer = server.post(TEXT, body).json()
    assert answer["choices"][0]["text"] == ""
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 1


def test_a_text_begins_with_one_start_of_text(server: Running) -> None:
    body = {"max_tokens": 0, "echo": True, "logprobs": 0}
    own = server.post(TEXT, {**body, "prompt": "<|startoftext|>abc"}).json()["choices"][0]
    added = server.post(TEXT, {**body, "prompt": "abc"}).json()["choices"][0]
    assert own["logprobs"]["token_logprobs"] == added["logprobs"]["token_logprobs"]
    assert (own["text"], added["text"]) == ("<|startoftext|>abc", "abc")


def test_seeds_draw_what_generate_draws_and_each_choice_has_its_own(server: Running) -> None:
    body = {"prompt": IDS, "max_tokens": 8, "temperature": 1.2, "top_p": 0.9, "seed": 5, "n": 3}
    choices = server.post(TEXT, body).json()["choices"]
    model = server.service.model
    for index, choice in enumerate(choices):
        seed = [row_seeds(5, 3)[index]]
        want = generated(model, IDS, 8, temperature=1.2, top_p=0.9, seed=seed)
        assert choice["text"] == model.tokenizer.to_string(want, text_start=False)
    assert len({choice["text"] for choice in choices}) == 3


def test_texts_ids_and_lists_of_both_are_prompts(server: Running) -> None:
    tokenizer = server.service.tokenizer
    ids = tokenizer.to_tokens("水は", bos=True)
    answers = [
        server.post(TEXT, {"prompt": prompt, "max_tokens": 4, "temperature": 0}).json()["choices"]
        for prompt in ("水は", ["水は", "水は"], ids, [ids, ids])
    ]
    assert {choice["text"] for choices in answers for choice in choices} == {answers[0][0]["text"]}
    assert [len(choices) for choices in answers] == [1, 2, 1, 2]
    assert [choice["index"] for choice in answers[1]] == [0, 1]


def test_echo_and_logprobs_score_as_the_model_does(server: Running) -> None:
    """What lm-evaluation-harness's local-completions reads: sums of log-probabilities, and whether each is the top."""
    model = server.service.model
    answer = server.post(TEXT, {"prompt": IDS, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}).json()
    found = answer["choices"][0]["logprobs"]
    logprobs = model(torch.tensor([IDS]))[0].log_softmax(-1)
    want = [logprobs[position, token_id].item() for position, token_id in enumerate(IDS[1:])]
    assert found["token_logprobs"][0] is None
    assert len(found["tokens"]) == len(IDS) + 1
    assert found["token_logprobs"][1:-1] == pytest.approx(want, rel=1e-4, abs=1e-4)
    assert sum(found["token_logprobs"][1:-1]) == pytest.approx(sum(want), rel=1e-5)
    greedy = [
        value == max(top.values())
        for value, top in zip(found["token_logprobs"][1:-1], found["top_logprobs"][1:-1], strict=True)
    ]
    assert greedy == [bool(logprobs[position].argmax() == token_id) for position, token_id in enumerate(IDS[1:])]
    only = server.post(TEXT, {"prompt": [IDS, IDS[:7]], "max_tokens": 0, "echo": True, "logprobs": 1}).json()["choices"]
    assert only[0]["logprobs"]["token_logprobs"] == found["token_logprobs"][:-1]
    assert len(only[1]["logprobs"]["tokens"]) == 7


def test_echo_shows_the_prompt_and_offsets_point_into_it(server: Running) -> None:
    answer = server.post(TEXT, {"prompt": "Water is 水", "max_tokens": 5, "echo": True, "logprobs": 0}).json()
    choice = answer["choices"][0]
    assert choice["text"].startswith("Water is 水")
    offsets = choice["logprobs"]["text_offset"]
    assert offsets[:2] == [0, 0]
    assert offsets == sorted(offsets)


def test_stop_strings_end_an_answer_and_are_not_shown(server: Running) -> None:
    body = {"prompt": IDS, "max_tokens": 20, "temperature": 0}
    whole = server.post(TEXT, body).json()["choices"][0]["text"]
    stop = whole[4:6]
    cut = server.post(TEXT, {**body, "stop": [stop]}).json()["choices"][0]
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_a_streamed_completion_joins_to_the_whole(server: Running) -> None:
    body = {"prompt": IDS, "max_tokens": 12, "temperature": 1, "seed": 3, "n": 2, "echo": True, "logprobs": 2}
    whole = server.post(TEXT, body).json()
    found = events(server.post(TEXT, {**body, "stream": True, "stream_options": {"include_usage": True}}))
    assert found.pop()["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [event["choices"][0] for event in found if event["choices"][0]["index"] == choice["index"]]
        assert "".join(one["text"] for one in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        joined = [value for one in mine if one["logprobs"] for value in one["logprobs"]["token_logprobs"]]
        assert joined == choice["logprobs"]["token_logprobs"]


def test_a_chat_answer_is_what_generate_writes_and_parse_reads(server: Running) -> None:
    model = server.service.model
    body = {"messages": MESSAGES, "max_completion_tokens": 30, "temperature": 0, "reasoning_effort": "low"}
    answer = server.post(CHAT, body).json()
    prompt = rendered(model, MESSAGES, effort="low")
    want = generated(model, prompt, 30)
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["usage"]["completion_tokens"] == len(want)
    before = model.tokenizer.to_tokens("<|start|>assistant", bos=False)
    messages = [m for m in parse([*before, *want], model.tokenizer) if m.channel == "final"]
    assert answer["choices"][0]["message"]["content"] == "".join(m.content for m in messages)


def test_a_streamed_chat_joins_to_the_whole(server: Running) -> None:
    body = {"messages": MESSAGES, "max_completion_tokens": 25, "temperature": 1, "seed": 8, "logprobs": True,
            "top_logprobs": 2, "max_thinking_tokens": 3, "logit_bias": {"9": 20.0, "12": 5.0}}  # fmt: skip
    whole = server.post(CHAT, body).json()["choices"][0]
    found = [event["choices"][0] for event in events(server.post(CHAT, {**body, "stream": True}))]
    for name in ("content", "reasoning_content"):
        assert "".join(one["delta"].get(name) or "" for one in found) == (whole["message"][name] or "")
        joined = [value for one in found if one["logprobs"] for value in one["logprobs"][name]]
        assert joined == whole["logprobs"][name]
    assert found[-1]["finish_reason"] == whole["finish_reason"]


def test_an_intervention_acts_on_its_own_request(server: Running) -> None:
    model = server.service.model
    body = {"prompt": IDS, "max_tokens": 16, "temperature": 0, "logprobs": 0}
    plain, changed = server.post(TEXT, body), server.post(TEXT, {**body, "intervention": to_json([GONE])})
    assert changed.json()["choices"][0]["text"] == model.tokenizer.to_string(
        generated(model, IDS, 16, interventions=[GONE]), text_start=False
    )
    assert plain.json()["choices"][0]["logprobs"] != changed.json()["choices"][0]["logprobs"]


def test_an_intervention_on_the_final_norm_acts_from_the_first_token(server: Running) -> None:
    model = server.service.model
    moved = AddVector(
        vector=torch.linspace(-9, 9, model.cfg.d_model), point="ln_final.hook_normalized", where=Where(positions=(-1,))
    )
    body = {"prompt": IDS, "max_tokens": 4, "temperature": 0}
    bodies = body, {**body, "intervention": to_json([moved])}
    plain, changed = (server.post(TEXT, one).json()["choices"][0]["text"] for one in bodies)
    want = generated(model, IDS, 4, interventions=[moved])
    assert changed == model.tokenizer.to_string(want, text_start=False) != plain


@pytest.mark.parametrize("stream", [False, True])
def test_routing_is_what_generate_records(server: Running, stream: bool) -> None:
    model = server.service.model
    body = {"prompt": IDS, "max_tokens": 6, "temperature": 0, "routing": True, "intervention": to_json([GONE])}
    if stream:
        record = events(server.post(TEXT, {**body, "stream": True}))[-1]["choices"][0]["routing"]
    else:
        record = server.post(TEXT, body).json()["choices"][0]["routing"]
    want = model.generate(torch.tensor([IDS]), max_new_tokens=6, record=["routing"], interventions=[GONE])
    ids, weights = routing_arrays(record)
    assert record["token_ids"] == want.tokens[0].tolist()
    assert record["n_prompt"] == len(IDS)
    assert ids.shape == (26, 2, 2)
    assert record["layers"] == [0, 1]
    assert record["n_experts"] == 8
    assert (ids == want.record.routing["expert_ids"][0].numpy()).all()
    assert weights == pytest.approx(want.record.routing["routing_weights"][0].numpy(), rel=1e-4, abs=1e-5)


REFUSED = [
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [*MESSAGES, {"role": "system", "content": "x"}]}, "messages[1]"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    (CHAT, {"messages": MESSAGES, "temperature": "hot"}, "temperature"),
    (CHAT, {"messages": MESSAGES, "temperature": -1}, "temperature"),
    (CHAT, {"messages": MESSAGES, "reasoning_effort": "extreme"}, "reasoning_effort"),
    (CHAT, {"messages": MESSAGES, "max_completion_tokens": 10_000}, "max_completion_tokens"),
    (CHAT, {"messages": MESSAGES, "max_tokens": 10_000}, "max_tokens"),
    (CHAT, {"messages": MESSAGES, "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format.type"),
    (CHAT, {"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"messages": MESSAGES, "logit_bias": {"cat": 1.0}}, "logit_bias"),
    (CHAT, {"messages": MESSAGES, "logit_bias": {"1" * 5000: 1.0}}, "logit_bias"),
    (CHAT, {"messages": MESSAGES, "logit_bias": {"050": 1.0}}, "logit_bias"),
    (CHAT, {"messages": MESSAGES, "logit_bias": {"-1": 1.0}}, "logit_bias"),
    (CHAT, {"messages": MESSAGES, "logit_bias": {"50": 1e39}}, "logit_bias"),
    (CHAT, {"messages": MESSAGES, "repetition_penalty": 1e-300}, "repetition_penalty"),
    (CHAT, {"messages": MESSAGES, "date": "2026-13-40"}, "date"),
    (CHAT, {"messages": MESSAGES, "min_p": 0.1}, "min_p"),
    (CHAT, {"messages": MESSAGES, "stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"messages": MESSAGES, "n": 129}, "n"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": [1, 2, 99_999]}, "prompt"),
    (TEXT, {"prompt": [[20], [99_999]]}, "prompt[1]"),
    (TEXT, {"prompt": "", "add_special_tokens": False}, "prompt"),
    (TEXT, {"prompt": IDS, "max_tokens": 400}, "max_tokens"),
    (TEXT, {"prompt": IDS, "best_of": 3}, "best_of"),
    (TEXT, {"prompt": IDS, "seed": 2**63}, "seed"),
    (TEXT, {"prompt": IDS, "intervention": {"format": 2, "interventions": []}}, "intervention.format"),
    (TEXT, {"prompt": IDS, "intervention": {"format": 1, "interventions": [{"kind": "magic"}]}}, "intervention"),
    (TEXT, {"prompt": IDS, "intervention": to_json([KnockOut(experts=(99,), mode="drop")])}, "intervention"),
    (TEXT, {"prompt": IDS, "intervention": to_json([IN_JAPANESE])}, "lang"),
    (TEXT, {"prompt": IDS, "intervention": {"format": 1, "interventions": [FAR]}}, "intervention"),
    (TEXT, {"prompt": [[20]] * 129}, "n"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param"), REFUSED)
def test_what_is_wrong_is_named(server: Running, path: str, body: dict, param: str) -> None:
    with server.client() as client:
        content = json.dumps({"model": "tiny", **body}).encode()
        answer = client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_other_refusals_have_the_same_shape(server: Running) -> None:
    with server.client() as client:
        wrong = client.post(TEXT, json={"model": "gpt-5", "prompt": "x"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (404, "model_not_found")
        for content in (b"{", b"\xff", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"):
            answer = client.post(TEXT, content=content, headers={"content-type": "application/json"})
            assert answer.status_code == 400, content[:20]
            assert answer.json()["error"]["message"]
        assert client.get(TEXT).status_code == 405
        assert client.get("/nowhere").json()["error"]["message"]


def test_fields_without_effect_are_taken(server: Running) -> None:
    body = {"prompt": IDS, "max_tokens": 5, "temperature": 0}
    extra = {"user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "best_of": 1, "suffix": None}
    assert server.post(TEXT, {**body, **extra}).json()["choices"] == server.post(TEXT, body).json()["choices"]


def test_a_dense_model_has_no_routing(tiny_llama: Llama) -> None:
    with running(tiny_llama) as server:
        answer = server.post(TEXT, {"prompt": IDS, "routing": True})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "routing")
