"""The committed checkpoints are the ones that were measured, load by name, and do what data/README.md says."""

from __future__ import annotations

import json
from hashlib import sha256

import pytest
import torch
from generator.conversations import conversation
from generator.parallel import EFFORTS, LANGUAGES
from measure_answers import answer_all, language_of
from measure_loss import bigram_loss, unigram_loss
from recipe import HERE, RECIPES
from tables import BEGIN, END, insert, sections

from workbench import load_model
from workbench.chat import render

FIGURES = json.loads((HERE / "evaluation.json").read_text("utf-8"))
README = (HERE.parent / "README.md").read_text("utf-8")
GOAL, GOAL_TASKS = 0.9, ("addition", "subtraction", "fact")
THINKING = [name for name, recipe in RECIPES.items() if recipe.is_thinking]


@pytest.mark.parametrize("name", RECIPES)
def test_checkpoint_is_the_measured_one(name: str) -> None:
    weights = (HERE / name / "model.safetensors").read_bytes()
    assert sha256(weights).hexdigest() == FIGURES["models"][name]["sha256"]


def test_readme_shows_the_measured_figures() -> None:
    assert README.split(BEGIN)[1].split(END)[0].strip() == sections(FIGURES)
    assert insert(README, FIGURES) == README


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the markers"):
        insert("nothing here", FIGURES)


@pytest.mark.parametrize("name", RECIPES)
def test_checkpoint_loads_by_name(name: str) -> None:
    model = load_model(name, progress=False)
    assert model.dtype == torch.bfloat16
    assert model.cfg.n_params == FIGURES["models"][name]["parameters"]
    assert model.tokenizer.hash == sha256((HERE / "tokenizer.json").read_bytes()).hexdigest()
    assert model.stop_ids == (2, 13)
    assert (model.chat_template is not None) == RECIPES[name].is_thinking


def test_all_together_are_small() -> None:
    assert sum(file.stat().st_size for name in RECIPES for file in (HERE / name).iterdir()) <= 32 * 2**20


@pytest.mark.parametrize("name", THINKING)
def test_the_template_renders_as_the_workbench_does(name: str) -> None:
    template = (HERE / name / "chat_template.jinja").read_text("utf-8")
    messages = [{"role": "developer", "content": "短く。"}, {"role": "user", "content": "27 + 15 はいくつですか。"}]
    for effort in EFFORTS:
        assert render(messages, effort=effort, date="2026-06-01", template=template) == render(
            messages, effort=effort, date="2026-06-01"
        )


def test_the_sparse_model_answers_held_out_questions() -> None:
    model = load_model("nano-moe-thinking", dtype="float32", progress=False)
    talks = [conversation(11, i, True, "addition", lang, effort, plain=True)
             for i in range(3) for lang in LANGUAGES for effort in EFFORTS]  # fmt: skip
    answered = answer_all(model, talks)
    assert sum(a.correct for a in answered) >= 0.8 * len(answered)
    assert all(language_of(a.final or "") == a.talk.lang for a in answered)
    lengths = {e: sum(a.n_analysis for a in answered if a.talk.effort == e) for e in EFFORTS}
    assert lengths["low"] < lengths["medium"] < lengths["high"]


@pytest.mark.parametrize("name", THINKING)
def test_measured_accuracies(name: str) -> None:
    for lang in LANGUAGES:
        for effort in EFFORTS:
            accuracy = FIGURES["models"][name]["chat"]["cells"][lang][effort]["accuracy"]
            assert min(accuracy[task] for task in GOAL_TASKS) >= GOAL


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in THINKING])
def test_measured_completions(name: str) -> None:
    for lang in LANGUAGES:
        accuracy = FIGURES["models"][name]["completion"][lang]
        assert min(accuracy[task] for task in GOAL_TASKS) >= GOAL


@pytest.mark.parametrize("name", [name for name in RECIPES if "moe" in name])
def test_no_expert_is_dead(name: str) -> None:
    assert all(layer["dead"] == 0 for layer in FIGURES["models"][name]["routing"]["load"])


def test_models_beat_the_baselines() -> None:
    for lang in LANGUAGES:
        unigram, bigram = (FIGURES["baselines"][name][lang]["nats_per_token"] for name in ("unigram", "bigram"))
        assert bigram < unigram
        assert all(found["loss"][lang]["nats_per_token"] < bigram for found in FIGURES["models"].values())


def test_baselines_on_a_text_worked_by_hand() -> None:
    training, held_out = [[1, 3, 4, 3, 4, 2]], [[1, 3, 4]]
    uniform = [[1, 5], [1, 6]]
    assert unigram_loss(uniform, [[1, 5]], d_vocab=8) == pytest.approx(1.6094, abs=1e-3)  # log(10 / 2)
    assert bigram_loss(training, held_out, 8) < unigram_loss(training, held_out, 8)
