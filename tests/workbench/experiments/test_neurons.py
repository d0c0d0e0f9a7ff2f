"""Counts equal a plain loop, the measures equal their definitions, and planted language neurons are found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F

from workbench.errors import ConfigError, ShapeError
from workbench.experiments.neurons import Activity, ablate_neurons, average_precision, lape, neuron_activity

TASKS = Path(__file__).resolve().parents[3] / "workbench" / "evals" / "tasks"
JA, EN = range(10, 30), range(30, 60)  # token ids of two made-up languages
EXPERT, NEURON = 2, 4


def corpus(n_groups=12, seed=0):
    """Sequences, languages and groups: each group in both languages, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    sequences, langs, groups = [], [], []
    for group in range(n_groups):
        for lang, ids in (("ja", JA), ("en", EN)):
            length = 5 + (group + len(lang) * (lang == "ja")) % 4
            sequences.append(torch.randint(ids.start, ids.stop, (length,), generator=generator).tolist())
            langs.append(lang)
            groups.append(f"g{group}")
    return sequences, langs, groups


@pytest.fixture
def planted(model):
    """Layer 0: one neuron (of one expert) whose gate opens for the first language only."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            writes = name.endswith(("o_proj.weight", "down_proj.weight", "mlp.down"))
            if name.startswith("blocks") and weight.ndim > 1 and not writes:
                weight[..., 0] = 0  # nobody else reads the language
        model.embed.weight[:, 0] = 0
        model.embed.weight[JA.start : JA.stop, 0] = 3
        model.embed.weight[EN.start : EN.stop, 0] = -3
        mlp = model.blocks[0].mlp
        gate = mlp.gate_up[EXPERT, NEURON] if model.cfg.is_moe else mlp.gate_proj.weight[NEURON]
        gate.zero_()
        gate[0] = 1
    return model


def test_counts_equal_a_plain_loop(model):
    sequences, langs, groups = corpus(3)
    read = [range(1, len(ids)) for ids in sequences]
    activity = neuron_activity(model, sequences, langs, groups, read=read, batch_size=4)
    for layer in range(3):
        for number, ids in enumerate(sequences):
            with torch.no_grad():
                _, cache = model.run_with_cache(torch.tensor([ids]), names_filter=lambda name: True)
            active, response, tokens = (
                np.zeros_like(part[layer][number]) for part in (activity.active, activity.response, activity.tokens)
            )
            for pos in read[number]:
                if activity.sparse[layer]:
                    for slot, expert in enumerate(cache["expert_ids", layer][0, pos].tolist()):
                        gate = cache["expert_pre", layer][0, pos, slot]
                        tokens[expert] += 1
                        active[expert] += (gate > 0).numpy()
                        response[expert] += F.silu(gate).numpy()
                else:
                    gate = cache["pre", layer][0, pos]
                    tokens[0] += 1
                    active[0] += (gate > 0).numpy()
                    response[0] += F.silu(gate).numpy()
            assert np.array_equal(activity.tokens[layer][number], tokens)
            assert np.array_equal(activity.active[layer][number], active)
            np.testing.assert_allclose(activity.response[layer][number], response, atol=1e-4)


def test_lape_finds_the_planted_neuron(planted):
    sequences, langs, groups = corpus()
    activity = neuron_activity(planted, sequences, langs, groups)
    result = lape(activity, bar=0.5, share=0.02, n_flips=300)
    expert = EXPERT if planted.cfg.is_moe else None
    best = result.frame.row(0, named=True)
    assert (best["layer"], best["expert"], best["neuron"]) == (0, expert, NEURON)
    assert (best["p_ja"], best["p_en"], best["lang"], best["entropy"]) == (1, 0, "ja", 0)
    if not planted.cfg.is_moe:  # inside experts not every group has tokens
        assert best["p_adjusted"] < 0.02
        assert result.frame["p_adjusted"].null_count() == 0


def test_average_precision_finds_the_planted_neuron(planted):
    sequences, langs, groups = corpus()
    activity = neuron_activity(planted, sequences, langs, groups)
    for lang in ("ja", "en"):
        frame = average_precision(activity, lang).frame
        if planted.cfg.is_moe:
            frame = frame.filter(pl.col("expert") == EXPERT)  # others have other sequences, and so other chances
        ranked = frame.filter(pl.col("layer") == 0)["neuron"].to_list()
        assert ranked[0 if lang == "ja" else -1] == NEURON


def test_settings_say_what_ran(model):
    sequences, langs, groups = corpus(2)
    read = [[0, 1] for _ in sequences]
    first = neuron_activity(model, sequences, langs, groups, read=read)
    for result in (lape(first), average_precision(first, "ja", min_sequences=1)):
        assert {"model", "runs", "interventions", "sequences", "read", "langs", "groups"} <= set(result.settings)
        assert result.settings["model"]["weights"] == first.settings["model"]["weights"]
        assert result.settings["n_sequences"] == 4
        json.dumps(result.settings, allow_nan=False)
    changed = {
        "sequences": neuron_activity(model, [*sequences[:-1], [*sequences[-1][:-1], 5]], langs, groups, read=read),
        "read": neuron_activity(model, sequences, langs, groups, read=[*read[:-1], [0]]),
        "langs": neuron_activity(model, sequences, langs[::-1], groups, read=read),
        "groups": neuron_activity(model, sequences, langs, groups[::-1], read=read),
    }
    for name, other in changed.items():
        assert {key for key, value in other.settings.items() if value != first.settings[key]} == {name}


def made_activity(p, tokens=100):
    """One dense layer; p [lang neuron] in a group of its own for each language."""
    active = (np.asarray(p) * tokens)[:, None]  # [sequence 1 neuron]
    return Activity({}, ("en", "ja"), ("g", "g"), {0: False}, {0: np.full((2, 1), tokens)}, {0: active}, {0: active})


def test_lape_is_the_published_rule():
    p = [[0.9, 0.5, 0.01, 0.6, 0.5], [0.1, 0.5, 0.0, 0.6, 0.45]]
    frame = lape(made_activity(p), bar=0.5, share=0.2).frame.sort("neuron")
    expected = [-(x * np.log(x) + (1 - x) * np.log(1 - x)) for x in (0.9, 0.5)]
    assert frame["entropy"].to_list()[:2] == pytest.approx(expected)
    assert frame["entropy"][2] == pytest.approx(0)
    assert frame["lang"].to_list() == ["en", None, None, None, None]  # neuron 2 fires too rarely to count


def test_average_precision_is_its_definition():
    langs = ("ja", "en", "ja", "en", "en", "ja", "en", "ja")
    scores = np.array([8.0, 7, 6, 5, 4, 3, 2, 1])
    rows = {0: scores[:, None, None]}
    activity = Activity({}, langs, langs, {0: False}, {0: np.ones((8, 1))}, rows, rows)
    value = average_precision(activity, "ja").frame["average_precision"].item()
    assert value == pytest.approx((1 / 1 + 2 / 3 + 3 / 6 + 4 / 8) / 4)


def test_sequences_that_never_chose_an_expert_take_no_part():
    langs = ("ja", "en") * 5
    tokens = np.ones((10, 2))
    tokens[:2, 1] = 0
    response = np.random.default_rng(0).random((10, 2, 3)).astype(np.float32)
    frame = average_precision(
        Activity({}, langs, langs, {3: True}, {3: tokens}, {3: response}, {3: response}), "ja"
    ).frame
    counts = frame.group_by("expert").agg(pl.col("n_sequences").first()).sort("expert")
    assert counts["n_sequences"].to_list() == [10, 8]
    assert frame["baseline"].unique().to_list() == [0.5]


def test_silencing_is_silencing_and_only_that(planted):
    sequences, langs, _ = corpus(3)
    expert = EXPERT if planted.cfg.is_moe else None
    neurons = pl.DataFrame(
        {"layer": [0], "expert": [expert], "neuron": [NEURON]}, schema_overrides={"expert": pl.Int64}
    )
    found = ablate_neurons(planted, neurons, sequences, langs, n_random=0).frame["loss"].to_list()
    weight = planted.blocks[0].mlp.down[EXPERT] if planted.cfg.is_moe else planted.blocks[0].mlp.down_proj.weight
    with torch.no_grad():
        weight[:, NEURON] = 0  # a neuron that nobody hears
        expected = []
        for ids in sequences:
            logits = planted(torch.tensor([ids]))[0, :-1]
            expected.append(float(F.cross_entropy(logits, torch.tensor(ids[1:]))))
    assert found == pytest.approx(expected, abs=1e-4)


def said_in_both_languages() -> list[tuple[str, str, str]]:
    """Facts as the bundled models were taught to say them: text, language, group."""
    rows = [json.loads(line) for line in (TASKS / "facts.jsonl").read_text(encoding="utf-8").splitlines()]
    start = "<|startoftext|>"
    return [
        (row["prompt"].removeprefix(start) + row["choices"][row["gold"]], row["lang"], row["group"]) for row in rows
    ]


@pytest.mark.slow
def test_japanese_neurons_of_a_trained_model_cost_japanese_alone(nano_dense):
    groups = sorted({group for *_, group in said_in_both_languages()})
    chosen_on = set(groups[::2])
    made = [row for row in said_in_both_languages() if row[2] in chosen_on]
    held_out = [row for row in said_in_both_languages() if row[2] not in chosen_on]
    encode = nano_dense.tokenizer.to_tokens
    texts, langs, of_group = zip(*made, strict=True)
    activity = neuron_activity(nano_dense, [encode(text, bos=True) for text in texts], langs, of_group)
    japanese = average_precision(activity, "ja").frame.filter(pl.col("average_precision") > 0.85)
    texts, langs, _ = zip(*held_out, strict=True)
    result = ablate_neurons(nano_dense, japanese, [encode(text, bos=True) for text in texts], langs).frame
    change = {key: part["change"] for key, part in result.group_by("neurons", "lang")}
    cost = change["selected", "ja"].mean()
    assert cost > 0.05, "nats per token, on facts that took no part in choosing them"
    assert cost > 4 * change["selected", "ja"].std() / len(change["selected", "ja"]) ** 0.5
    assert abs(change["selected", "en"].mean()) < cost / 20, "English does without them"
    for drawn in (f"random {number}" for number in range(3)):  # a set that costs Japanese as much costs English too
        assert change[drawn, "ja"].mean() < cost or change[drawn, "en"].mean() > cost / 5


def test_wrong_requests_are_refused(llama):
    sequences, langs, groups = corpus(2)
    with pytest.raises(ShapeError, match="as many languages"):
        neuron_activity(llama, sequences, langs[:1], groups)
    activity = neuron_activity(llama, sequences[::2], langs[::2], groups[::2])
    with pytest.raises(ConfigError, match="at least two languages"):
        lape(activity)
    with pytest.raises(ConfigError, match="some of another"):
        average_precision(activity, "ja")
    with pytest.raises(ConfigError, match="at least one"):
        ablate_neurons(llama, pl.DataFrame({"layer": [], "expert": [], "neuron": []}), sequences, langs)


def test_a_control_must_be_as_large_as_what_is_selected(model):
    sequences, langs, _ = corpus(6)
    expert, size = (1, model.cfg.d_expert) if model.cfg.is_moe else (None, model.cfg.d_mlp)
    rows = [(0, expert, neuron) for neuron in range(size // 2 + 1)]
    chosen = pl.DataFrame(rows, schema={"layer": pl.Int64, "expert": pl.Int64, "neuron": pl.Int64}, orient="row")
    with pytest.raises(ConfigError, match=f"expected at most half of the {size} of layer 0"):
        ablate_neurons(model, chosen, sequences, langs)
    half = ablate_neurons(model, chosen[: size // 2], sequences, langs, n_random=1).frame
    assert half.filter(pl.col("neurons") == "random 0")["change"].abs().max() > 0
    assert len(ablate_neurons(model, chosen, sequences, langs, n_random=0).frame) == len(sequences)
    with pytest.raises(ConfigError, match="expected each one once"):
        ablate_neurons(model, pl.concat([chosen, chosen]), sequences, langs)


@pytest.mark.parametrize("place", [3, -1])
def test_padding_is_not_read(model, place):
    with pytest.raises(ShapeError, match=f"read: expected positions from 0 to 2 in sequence 0, got {place}"):
        neuron_activity(model, [[5, 6, 7], [5, 6, 7, 8, 9]], ["ja", "en"], ["g", "g"], read=[[place], [4]])
