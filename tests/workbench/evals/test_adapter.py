"""What the adapter reads, writes and refuses, request by request."""

from __future__ import annotations

from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from workbench.chat import render
from workbench.errors import ConfigError
from workbench.evals.adapter import DATE, WorkbenchLM
from workbench.evals.languages import item_group, item_language
from workbench.interventions import SetActivation, Where
from workbench.models import Llama


def lm_of(model: Llama, **arguments: Any) -> WorkbenchLM:
    return WorkbenchLM(model, progress=False, **arguments)


def ask(kind: str, *arguments: Any, doc: dict[str, Any] | None = None, task: str = "some_task") -> Instance:
    return Instance(kind, doc or {}, arguments, 0, metadata=(task, 0, 1))


def test_it_is_a_model_of_the_harness() -> None:
    assert get_model("workbench") is WorkbenchLM
    lm = WorkbenchLM.create_from_arg_string("pretrained=nano-dense-base,add_bos=False", {"batch_size": "4"})
    assert (lm.model.cfg.model_type, lm.batch_size, lm.add_bos) == ("llama", 4, False)


def test_text_begins_with_bos_and_a_conversation_does_not(thinking: Llama) -> None:
    lm = lm_of(thinking)
    bos, chat = thinking.tokenizer.bos_id, render([{"role": "user", "content": "1 + 1?"}], date=DATE)
    assert lm.tok_encode("日本の首都は")[0] == bos
    assert lm.tok_encode("<|startoftext|>日本の首都は") == lm.tok_encode("日本の首都は")
    assert lm.tok_encode(chat)[0] == thinking.tokenizer.start_id
    assert lm.tok_encode("日本の首都は", add_special_tokens=False)[0] != bos
    assert lm_of(thinking, add_bos=False).tok_encode("日本")[0] != bos
    assert lm_of(thinking, add_bos=True).tok_encode(chat)[:2] == [bos, thinking.tokenizer.start_id]


def test_conversations_are_rendered_at_their_effort(thinking: Llama) -> None:
    history = [{"role": "system", "content": "短く。"}, {"role": "user", "content": "1 + 1?"}]
    text = lm_of(thinking, effort="high").apply_chat_template(history)
    assert "Reasoning: high" in text
    assert f"Current date: {DATE}" in text
    assert "# Instructions\n\n短く。" in text
    assert text.endswith("<|start|>assistant")
    opened = lm_of(thinking).apply_chat_template([*history, {"role": "assistant", "content": "2"}], False)
    assert opened.endswith("<|start|>assistant<|channel|>final<|message|>2")


def test_choices_of_a_conversation_are_scored_in_the_final_channel(thinking: Llama) -> None:
    lm = lm_of(thinking)
    prompt = lm.apply_chat_template([{"role": "user", "content": "2 + 3 はいくつですか。"}])
    asked = [ask("loglikelihood", prompt, choice) for choice in (" 5", "5")]
    first, second = lm.loglikelihood(asked)
    assert first == second
    header = "<|channel|>final<|message|>"
    assert lm_of(thinking, score_in_final=False).loglikelihood([ask("loglikelihood", prompt + header, "5")]) == [second]
    assert lm_of(thinking, score_in_final=False).loglikelihood([asked[1]]) != [second]


def test_an_empty_context_is_bos(base: Llama) -> None:
    lm = lm_of(base)
    (found,) = lm.loglikelihood([ask("loglikelihood", "", "The capital of France is Paris.")])
    (rolled,) = lm.loglikelihood_rolling([ask("loglikelihood_rolling", "The capital of France is Paris.")])
    (begun,) = lm.loglikelihood_rolling(
        [ask("loglikelihood_rolling", "<|startoftext|>The capital of France is Paris.")]
    )
    assert found[0] == pytest.approx(rolled, rel=1e-5)
    assert begun == rolled


def test_long_texts_roll_over_every_token_once(base: Llama) -> None:
    text = "The capital of France is Paris. " * 6
    asked = [ask("loglikelihood_rolling", text)]
    (whole,), (rolled,) = (
        lm_of(base).loglikelihood_rolling(asked),
        lm_of(base, max_length=16).loglikelihood_rolling(asked),
    )
    assert rolled < whole < 0


def test_writing_stops_before_a_string_and_counts_tokens(base: Llama) -> None:
    lm = lm_of(base)
    prompt = "<|startoftext|>The capital of France is"
    (long,) = lm.generate_until([ask("generate_until", prompt, {"until": [], "max_gen_toks": 8})])
    (cut,) = lm.generate_until([ask("generate_until", prompt, {"until": ["."], "max_gen_toks": 8})])
    assert cut == long.split(".")[0]
    (short,) = lm.generate_until([ask("generate_until", prompt, {"until": [], "max_gen_toks": 1})])
    assert long.startswith(short)
    assert len(lm.tok_encode(short, add_special_tokens=False)) <= 2


def test_only_the_final_channel_is_the_answer(thinking: Llama) -> None:
    prompt = render([{"role": "user", "content": "2 + 3 はいくつですか。"}], effort="medium", date=DATE)
    request = [ask("generate_until", prompt, {"until": ["。"], "max_gen_toks": 160})]
    (final,), (everything,) = (
        lm_of(thinking).generate_until(request),
        lm_of(thinking, answers="all").generate_until(request),
    )
    assert final
    assert "。" not in final  # the thinking holds some, and was not cut there
    assert everything.startswith("analysis")
    (none,) = lm_of(thinking).generate_until([ask("generate_until", prompt, {"until": [], "max_gen_toks": 3})])
    assert none == ""


def test_samples_are_repeatable_and_repeats_differ(base: Llama) -> None:
    asked = [ask("generate_until", "<|startoftext|>", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12})] * 2
    first, second = (lm_of(base, seed=seed).generate_until(asked) for seed in (1, 2))
    assert lm_of(base, seed=1).generate_until(asked) == first
    assert first[0] != first[1]  # asked twice, drawn twice
    assert lm_of(base, seed=1).generate_until(asked[:1]) == first[:1]
    assert first != second


def test_arguments_that_are_not_known_are_refused(base: Llama) -> None:
    with pytest.raises(ConfigError, match="got num_beams"):
        lm_of(base).generate_until([ask("generate_until", "a", {"num_beams": 4})])
    with pytest.raises(ConfigError, match="fewer than the context's 512 tokens, got 512"):
        lm_of(base).generate_until([ask("generate_until", "a", {"max_gen_toks": 512})])
    for arguments in ({"answers": "some"}, {"batch_size": "auto"}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match="expected"):
            lm_of(base, **arguments)


def test_what_is_cut_is_counted(base: Llama) -> None:
    lm = lm_of(base, max_length=16)
    lm.loglikelihood([ask("loglikelihood", "one two three four five six seven eight nine ten eleven", " twelve")])
    lm.generate_until([ask("generate_until", "one two three four five six seven eight", {"max_gen_toks": 8})])
    assert lm.counts["contexts_cut"] == 2


def test_interventions_know_each_items_language(base: Llama) -> None:
    quiet = SetActivation(value=0.0, point="mlp_out", where=Where(langs=("ja",)))
    asked = [
        ask("loglikelihood", "The capital of France is", " Paris.", doc={"lang": lang}, task=task)
        for lang, task in (("ja", "t"), ("en", "t"), (None, "mgsm_direct_ja"), (None, "t"))
    ]
    plain, changed = lm_of(base).loglikelihood(asked), lm_of(base, interventions=[quiet]).loglikelihood(asked)
    assert [a[0] == pytest.approx(b[0], rel=1e-5) for a, b in zip(plain, changed, strict=True)] == [
        False,
        True,
        False,
        True,
    ]


def test_languages_and_groups_of_items() -> None:
    assert item_language({"lang": "ja"}, "any_en") == "ja"
    assert item_language({}, "ja_leaderboard_mgsm") == "ja"
    assert item_language({}, "mgsm_direct_en") == "en"
    assert item_language({}, "japanese_leaderboard") == "ja"
    assert item_language({}, "translate_ja_en") is None
    assert item_language({}, "hellaswag") is None
    assert item_group({"group": "capital:France"}, "t", 3) == "capital:France"
    assert item_group({}, "t", 3) == "t/3"
