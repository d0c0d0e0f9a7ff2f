from __future__ import annotations

from dataclasses import replace

import pytest

from workbench.chat import harmony_template
from workbench.errors import ConfigError, PromptError, RunError
from workbench.io.prompts import Prompt
from workbench.study.plan import Settings, choose_prompts, plan_documents, settings_for


def test_every_prompt_at_every_effort_in_harmony_without_bos(prompts: list[Prompt], small) -> None:
    documents = plan_documents(prompts, small.tokenizer, Settings())
    assert len(documents) == len(prompts) * 3
    assert len({document.doc_id for document in documents}) == len(documents)
    assert [document.effort for document in documents[:: len(prompts)]] == ["low", "medium", "high"]
    assert documents[0].ids[0] == small.tokenizer.start_id
    text = small.tokenizer.to_string(documents[-1].ids)
    assert "Reasoning: high" in text
    assert "Current date: 2026-01-01" in text


def test_a_checkpoints_own_template_is_used(prompts: list[Prompt], small) -> None:
    own = harmony_template()
    settings = Settings(efforts=("high",))
    assert plan_documents(prompts, small.tokenizer, settings, own) == plan_documents(prompts, small.tokenizer, settings)
    (document,) = plan_documents(prompts[:1], small.tokenizer, settings, "{{ messages[0].content }}!")
    assert small.tokenizer.to_string(document.ids) == prompts[0].text + "!"


def test_plain_text_is_the_text_after_bos_without_effort(prompts: list[Prompt], small) -> None:
    documents = plan_documents(prompts, small.tokenizer, Settings(template="plain"))
    assert len(documents) == len(prompts)
    assert documents[0].effort is None
    sea = next(document for document in documents if document.doc_id == "sea-en")
    assert sea.ids == (1, *small.tokenizer.to_tokens("Why is the sea blue?", bos=False))


def test_text_that_looks_like_a_control_token_stays_text(prompts: list[Prompt], small) -> None:
    hostile = [
        document for document in plan_documents(prompts, small.tokenizer, Settings()) if "hostile" in document.doc_id
    ]
    calm = plan_documents(prompts[:1], small.tokenizer, Settings())
    for document in hostile:
        assert document.ids.count(small.tokenizer.start_id) == calm[0].ids.count(small.tokenizer.start_id)


def test_other_languages_kinds_and_scripts_are_left_out(prompts: list[Prompt]) -> None:
    others = [
        replace(prompts[0], doc_id="a", lang="mixed"),
        replace(prompts[0], doc_id="b", script="romaji"),
        replace(prompts[0], doc_id="c", kind="script"),
    ]
    assert choose_prompts([*others, *prompts]) == prompts
    with pytest.raises(PromptError, match="expected ja or en rows"):
        choose_prompts(others)


def test_a_limit_keeps_whole_groups_spread_over_the_file(prompts: list[Prompt]) -> None:
    assert [prompt.group_id for prompt in choose_prompts(prompts, limit=2)] == ["sum", "sum", "hostile", "hostile"]
    assert choose_prompts(prompts, limit=99) == prompts
    with pytest.raises(PromptError, match="at least 1 group, got 0"):
        choose_prompts(prompts, limit=0)


def test_settings_follow_the_model_unless_told_otherwise() -> None:
    assert settings_for(None) == Settings(template="plain", max_new_tokens=0)
    assert settings_for("a template") == Settings()
    assert settings_for(None, template="harmony", max_new_tokens=3, efforts=["low"]) == Settings("harmony", ("low",), 3)
    with pytest.raises(RunError, match="efforts: expected none in plain text, got low"):
        settings_for(None, efforts=["low"])
    with pytest.raises(RunError, match="efforts: expected none in plain text, got an empty list"):
        settings_for(None, efforts=())
    with pytest.raises(RunError, match="efforts: expected some of low, medium, high, got none"):
        settings_for("a template", efforts=())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("template", "chatml", "template: expected one of harmony, plain, got 'chatml'"),
        ("efforts", ("low", "extreme"), "efforts: expected some of low, medium, high, got low, extreme"),
        ("efforts", (), "got none"),
        ("max_new_tokens", -1, "max_new_tokens: expected at least 0"),
        ("batch_size", 0, "batch_size: expected at least 1"),
    ],
)
def test_bad_settings_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(RunError, match=message):
        Settings(**{field: value})


def test_efforts_that_render_alike_are_not_compared(prompts: list[Prompt], small) -> None:
    ignores_effort = "{{ messages[0].content }}!"
    with pytest.raises(ConfigError, match=r"tells low from medium, got the same tokens for both. Pass --efforts low"):
        plan_documents(prompts, small.tokenizer, Settings(), ignores_effort)
    assert len(plan_documents(prompts, small.tokenizer, Settings(efforts=("low",)), ignores_effort)) == len(prompts)
