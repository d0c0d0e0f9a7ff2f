"""Vectors are what was planted, turn the answer where it was planted, and steer held-out prompts of a trained model."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch

from workbench.chat.parse import label_tokens
from workbench.errors import ConfigError
from workbench.experiments.contrasts import Contrast, channel_contrast, chat, effort_contrast, language_contrast
from workbench.experiments.result import Result
from workbench.experiments.steering import evaluate_steering, japanese_share, log_odds, steering_vectors, written_length
from workbench.interventions import Where
from workbench.io.prompts import load_prompts, select
from workbench.planted.mechanisms import copying_head, deciding_route

TASKS = Path(__file__).resolve().parents[3] / "workbench" / "evals" / "tasks"


def planted_contrast(planted, pairs):
    versions = [tokens[pairs].tolist() for tokens in (planted.clean, planted.corrupt)]
    reads = [[[planted.query_pos]] * len(version) for version in versions]
    return Contrast("planted", *versions, *reads)


@pytest.fixture(scope="module")
def prompts():
    return [prompt for prompt in load_prompts() if prompt.kind == "parallel"]


def test_the_planted_direction_is_found_and_turns_the_answer():
    planted = copying_head("qwen3_moe", n_pairs=8)
    steering = steering_vectors(planted.model, planted_contrast(planted, slice(0, 4)))
    assert steering.vectors[planted.head_layer - 1].abs().max() == 0  # nothing has reached the query yet
    held_out = planted.clean[4:].tolist()
    last = Where(positions=(-1,))
    result = evaluate_steering(
        planted.model, steering, held_out, log_odds(planted.correct, planted.wrong),
        layers=[planted.model.cfg.n_layers - 1], scales=(-1, 0), n_random=2, where=last,
    )  # fmt: skip
    with torch.no_grad():
        corrupt = planted.model(planted.corrupt[4:])[:, -1]
    expected = corrupt[:, planted.correct] - corrupt[:, planted.wrong]
    steered = result.frame.filter(pl.col("vector") == "steering", pl.col("scale") == -1)
    torch.testing.assert_close(steered["value"].to_torch().float(), expected, atol=0, rtol=0.05)
    drawn = result.frame.filter(pl.col("vector") != "steering", pl.col("scale") == -1)
    assert drawn["value"].min() > 0  # the clean answer stands
    assert result.frame.filter(pl.col("scale") == 0)["change"].abs().max() == 0


def test_a_router_vector_turns_a_decision_of_the_router():
    planted = deciding_route(n_pairs=8)
    steering = steering_vectors(planted.model, planted_contrast(planted, slice(0, 4)), "router_logits")
    vector = steering.vectors[planted.writer_layer]
    assert set(vector.abs().topk(2).indices.tolist()) == set(planted.experts)
    outcome = log_odds(planted.correct, planted.wrong)
    held_out = planted.clean[4:].tolist()
    frame = evaluate_steering(
        planted.model, steering, held_out, outcome, layers=[planted.writer_layer], scales=(-1, 0), n_random=0
    ).frame
    assert frame.filter(pl.col("scale") == 0)["value"].min() > 0.5
    assert frame.filter(pl.col("scale") == -1)["value"].max() < -0.5


def test_vectors_are_the_difference_of_means(moe):
    sequences = [[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14, 15]]
    contrast = Contrast("test", *sequences, [[0, 2], [1]], [[1], [0, 1, 3]])
    with torch.no_grad():
        means = [
            torch.stack([
                moe.run_with_cache(torch.tensor([ids]))[1]["resid_post", 1][0, places].mean(0)
                for ids, places in zip(part, read, strict=True)
            ]).mean(0)
            for part, read in zip(sequences, (contrast.read_positive, contrast.read_negative), strict=True)
        ]  # fmt: skip
    for size in (1, 16):
        vector = steering_vectors(moe, contrast, batch_size=size).vectors[1]
        torch.testing.assert_close(vector, means[0] - means[1], atol=1e-5, rtol=1e-5)
    router = steering_vectors(moe, contrast, "router_logits")
    assert sorted(router.vectors) == [0, 2]
    shuffled = router.random(0).vectors[0]
    assert not torch.equal(shuffled, router.vectors[0])
    assert torch.equal(shuffled.sort().values, router.vectors[0].sort().values)


def test_contrasts_read_what_they_say(nano, prompts):
    tokenizer, few = nano.tokenizer, prompts[:6]
    language = language_contrast(few, tokenizer)
    assert len(language.positive) == 3
    for ids, places in zip(language.positive, language.read_positive, strict=True):
        assert {label_tokens(ids, tokenizer)[pos] for pos in places} == {"user"}
    english = select(few, lang="en")
    effort = effort_contrast(english, tokenizer)
    for more, less, places in zip(effort.positive, effort.negative, effort.read_positive, strict=True):
        assert sum(a != b for a, b in zip(more, less, strict=True)) == 1  # the word for the effort
        assert places == [len(more) - 1]
    channel = channel_contrast(english, ["It is Paris.", "Yes, 5.", "No."], tokenizer)
    for one, other, at_one, at_other in zip(
        channel.positive, channel.negative, channel.read_positive, channel.read_negative, strict=True
    ):
        assert [one[pos] for pos in at_one] == [other[pos] for pos in at_other]
        assert len(at_one) > 0


@pytest.mark.slow
@pytest.mark.parametrize("which", ["nano", "nano_dense"])
def test_japanese_steering_turns_english_questions_that_the_model_answers_in_english(which, request, prompts):
    model = request.getfixturevalue(which)
    made = select(prompts, split="discovery")[:80]
    rows = [json.loads(line) for line in (TASKS / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = {row["question"] for row in rows if row["kind"] == "facts" and row["lang"] == "en"}
    held_out = [chat(text, model.tokenizer) for text in sorted(asked - {prompt.text for prompt in made})]
    steering = steering_vectors(model, language_contrast(made, model.tokenizer))
    result = evaluate_steering(
        model, steering, held_out, japanese_share(24), layers=[1, 2, 3], scales=(0, 1), n_random=2
    )
    assert result.frame.filter(pl.col("scale") == 0)["value"].max() == 0, "no Japanese without it"
    changed = result.frame.filter(pl.col("scale") == 1)
    means = {row["vector"]: row for row in Result(changed, {}).mean("change", by="vector").rows(named=True)}
    assert means["steering"]["n_units"] == len(held_out) > 15
    assert means["steering"]["low"] > 0.02, "the interval over prompts is above none"
    assert means["steering"]["mean"] > 3 * max(means["random 0"]["mean"], means["random 1"]["mean"])


def test_length_counts_what_is_written(nano, prompts):
    ids = [chat(p.text, nano.tokenizer) for p in select(prompts, lang="en")[:2]]
    lengths = written_length(30)(nano, ids, [])
    for prompt, length in zip(ids, lengths, strict=True):
        alone = nano.generate(torch.tensor([prompt]), max_new_tokens=30).continuations()[0]
        assert length == len(alone)


def test_prompts_of_the_contrast_and_unknown_places_are_refused(nano, nano_dense, prompts):
    contrast = language_contrast(prompts[:4], nano.tokenizer)
    steering = steering_vectors(nano, contrast)
    with pytest.raises(ConfigError, match="held-out"):
        evaluate_steering(nano, steering, contrast.negative, japanese_share(), layers=[0])
    with pytest.raises(ConfigError, match="layers: expected some of 0, 1"):
        steering.interventions([9])
    with pytest.raises(ConfigError, match="point: expected"):
        steering_vectors(nano_dense, contrast, "router_logits")
    with pytest.raises(ConfigError, match="a position to read"):
        Contrast("empty", [[1]], [[2]], [[0]], [[]])


def test_the_same_question_at_another_effort_is_not_held_out(nano, prompts):
    few = select(prompts, split="discovery")[:2]
    steering = steering_vectors(nano, effort_contrast(few, nano.tokenizer, "high", "low"))
    with pytest.raises(ConfigError, match="expected held-out ones, got one of the contrast's own"):
        evaluate_steering(nano, steering, [chat(few[1].text, nano.tokenizer, "medium")], log_odds(5, 6), layers=[1])
