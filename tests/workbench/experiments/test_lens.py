"""Parts sum to the logit, and the planted writer is the part that says the answer."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from closeness import assert_near

from workbench.errors import ConfigError, InterventionError, ShapeError
from workbench.experiments.lens import PARTS, direct_logit_attribution, expert_logit_lens, logit_lens
from workbench.interventions import AddVector, ScaleActivation, SetExpertOutput, Where
from workbench.planted.mechanisms import copying_head, deciding_route, writing_mlp


@pytest.mark.parametrize("parts", PARTS)
def test_parts_sum_to_the_logit_and_to_the_difference(nano, parts):
    tokens = torch.randint(300, 2800, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = nano(tokens)[:, -2]
    rows = torch.arange(3)
    correct, wrong = torch.tensor([700, 800, 900]), 600
    for result, total in (
        (direct_logit_attribution(nano, tokens, correct, parts=parts, pos=-2), logits[rows, correct]),
        (
            direct_logit_attribution(nano, tokens, correct, wrong, parts=parts, pos=-2),
            logits[rows, correct] - logits[:, 600],
        ),
    ):
        sums = result.frame.group_by("pair", maintain_order=True).agg(pl.col("value").sum())["value"].to_torch()
        assert_near(sums.float(), total, logits)
        assert_near(torch.tensor(result.settings["total"]), total, logits)


CHANGES = {
    "stream": [AddVector(vector=torch.linspace(-3, 3, 128), where=Where(layers=(0, 3)))],
    "embedding": [ScaleActivation(factor=2.0, point="hook_embed")],
    "attention": [ScaleActivation(factor=2.0, point="attn_out", where=Where(positions=(-2, 1)))],
    "mlp": [ScaleActivation(factor=2.0, point="mlp_out"), ScaleActivation(factor=0.5, point="resid_mid")],
    "experts": [SetExpertOutput(experts=tuple(range(20)), value=torch.ones(128), where=Where(layers=(1,)))],
}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("change", list(CHANGES))
def test_parts_sum_to_the_logit_under_interventions_too(nano, parts, change):
    tokens = torch.randint(300, 2800, (2, 6), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), nano.intervene(CHANGES[change]):
        logits = nano(tokens)
        result = direct_logit_attribution(nano, tokens, 700, 600, parts=parts, pos=-2)
    sums = result.frame.group_by("pair", maintain_order=True).agg(pl.col("value").sum())["value"].to_torch()
    assert_near(sums.float(), logits[:, -2, 700] - logits[:, -2, 600], logits)
    if change == "stream":
        steered = result.frame.filter(pl.col("component") == "intervention")
        assert steered["layer"].to_list() == [0, 3] * 2
        assert steered["value"].abs().min() > 0.01
    moved = ScaleActivation(factor=2.0, point="ln_final.hook_normalized")
    with nano.intervene(moved), pytest.raises(InterventionError, match="expected the final norm as it is"):
        direct_logit_attribution(nano, tokens, 700, parts=parts)


def test_finer_parts_sum_to_coarser_ones(nano):
    tokens = torch.randint(300, 2800, (2, 6), generator=torch.Generator().manual_seed(1))
    frames = {parts: direct_logit_attribution(nano, tokens, 700, parts=parts).frame for parts in PARTS}
    coarse = frames["component"].sort("pair", "layer", "component")
    merged = {"head": "attn", "expert": "mlp", "neuron": "mlp"}
    for parts in PARTS[1:]:
        sums = (
            frames[parts].with_columns(pl.col("component").replace(merged))
            .group_by("pair", "component", "layer").agg(pl.col("value").sum())
            .sort("pair", "layer", "component")
        )  # fmt: skip
        assert_near(sums["value"].to_torch(), coarse["value"].to_torch())


def test_padding_changes_nothing(nano):
    tokens = torch.randint(300, 2800, (1, 6), generator=torch.Generator().manual_seed(2))
    padded = torch.cat([torch.full((1, 3), 4), tokens], dim=1)
    mask = (torch.arange(9) >= 3).long()[None]
    plain, shifted = (
        direct_logit_attribution(nano, tokens, 700).frame,
        direct_logit_attribution(nano, padded, 700, attention_mask=mask).frame,
    )
    keys = ["component", "layer", "head", "expert"]
    assert plain.select(keys).equals(shifted.select(keys))
    torch.testing.assert_close(plain["value"].to_torch(), shifted["value"].to_torch(), atol=1e-4, rtol=1e-3)
    lens = logit_lens(nano, padded, 700, mask, pos=None).frame
    assert lens["pos"].unique().sort().to_list() == list(range(3, 9))


def test_the_planted_writer_says_the_answer_and_its_neighbours_do_not():
    planted = writing_mlp("qwen3_moe")
    frame = direct_logit_attribution(planted.model, planted.clean, planted.correct, planted.wrong).frame
    means = frame.group_by("component", "layer", "head", "expert").agg(pl.col("value").mean()).sort("value")
    top, rest = means.row(-1, named=True), means[:-1]
    assert (top["component"], top["layer"], top["expert"]) == ("expert", planted.writer_layer, planted.experts[0])
    assert top["value"] > 0.1
    assert rest["value"].abs().max() < 1e-5 * top["value"]


def test_the_planted_neuron_and_head_are_found():
    dense = writing_mlp("llama")
    frame = direct_logit_attribution(dense.model, dense.clean, dense.correct, dense.wrong, parts="neuron").frame
    best = frame.filter(pl.col("pair") == "0").sort("value").row(-1, named=True)
    assert (best["component"], best["layer"], best["neuron"]) == ("neuron", dense.writer_layer, dense.neuron)
    for architecture in ("llama", "qwen3_moe"):
        planted = copying_head(architecture)
        frame = direct_logit_attribution(planted.model, planted.clean, planted.correct, planted.wrong).frame
        for pair in frame.partition_by("pair"):
            best = pair.sort("value").row(-1, named=True)
            assert (best["component"], best["layer"], best["head"]) == ("head", planted.head_layer, planted.head)


def test_logit_lens_shows_where_the_answer_appears_and_ends_in_the_prediction():
    planted = writing_mlp("qwen3_moe")
    frame = logit_lens(planted.model, planted.clean, planted.correct).frame
    ranks = frame.group_by("layer", maintain_order=True).agg(pl.col("rank").max())
    before, after = (
        ranks.filter(pl.col("layer") < planted.writer_layer),
        ranks.filter(pl.col("layer") >= planted.writer_layer),
    )
    assert before["rank"].min() > 0
    assert after["rank"].max() == 0


def test_the_last_row_of_the_lens_is_the_model(nano):
    tokens = torch.randint(300, 2800, (2, 5), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        log_probs = nano(tokens).log_softmax(-1)
    last = logit_lens(nano, tokens, [700, 800], pos=None).frame.filter(pl.col("layer") == nano.cfg.n_layers - 1)
    found = last["log_probability"].to_torch().reshape(2, 5)
    assert_near(found, torch.stack([log_probs[0, :, 700], log_probs[1, :, 800]]), log_probs)
    assert last["top_id"].to_list() == log_probs.argmax(-1).flatten().tolist()


def test_expert_lens_tells_which_expert_speaks_for_which_answer():
    planted = deciding_route()
    for tokens, expert, answer in (
        (planted.clean, planted.experts[0], planted.correct),
        (planted.corrupt, planted.experts[1], planted.wrong),
    ):
        frame = expert_logit_lens(planted.model, tokens, top=2).frame.filter(pl.col("layer") == planted.writer_layer)
        chosen = frame.filter(pl.col("expert") == expert)
        assert len(chosen) == len(tokens)
        assert chosen["top_ids"].list.first().unique().to_list() == [answer]


def test_expert_lens_adds_up_to_what_the_layers_write(moe, tokens):
    lens = expert_logit_lens(moe, tokens[:1], top=moe.cfg.d_vocab).frame
    exploded = lens.explode("top_ids", "top_values").group_by("top_ids").agg(pl.col("top_values").sum()).sort("top_ids")
    with torch.no_grad():
        _, cache = moe.run_with_cache(tokens[:1])
        written = cache["mlp_out", 0][0, -1] + cache["mlp_out", 2][0, -1]  # layer 1 is dense
        expected = moe.unembed(written / cache["ln_final.hook_scale"][0, -1] * moe.ln_final.weight)
    found = exploded["top_values"].to_torch().float()
    assert_near(found, expected - expected.mean())


def test_wrong_requests_are_refused(nano, nano_dense):
    tokens = torch.tensor([[300, 301]])
    with pytest.raises(ConfigError, match="parts: expected one of component"):
        direct_logit_attribution(nano, tokens, 700, parts="layer")
    with pytest.raises(ConfigError, match="with experts"):
        expert_logit_lens(nano_dense, tokens)
    with pytest.raises(ShapeError, match="one per row"):
        logit_lens(nano, tokens, [1, 2])


def test_expert_lens_freezes_the_scale_of_each_position(moe, tokens):
    """Nothing later reaches a position, so each reads as the last one of a shorter prompt does."""
    whole = expert_logit_lens(moe, tokens, pos=None).frame
    for pos in (0, 3):
        mine = whole.filter(pl.col("pos") == pos)
        alone = expert_logit_lens(moe, tokens[:, : pos + 1]).frame
        assert mine["expert"].to_list() == alone["expert"].to_list()
        for name in ("top_values", "bottom_values"):
            assert_near(torch.tensor(mine[name].to_list()), torch.tensor(alone[name].to_list()))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda m, t: logit_lens(m, t, 5, pos=99), "pos: expected a column from -7 to 6, got 99"),
        (lambda m, t: expert_logit_lens(m, t, pos=7), "pos: expected a column from -7 to 6, got 7"),
        (lambda m, t: direct_logit_attribution(m, t, 5, pos=-8), "pos: expected a column from -7 to 6, got -8"),
        (lambda m, t: logit_lens(m, t, [5, 60]), "token ids: expected 0 to 59"),
        (lambda m, t: direct_logit_attribution(m, t, 5, -1), "token ids: expected 0 to 59"),
    ],
)
def test_places_and_tokens_that_do_not_exist_are_refused(moe, tokens, run, message):
    with pytest.raises(ShapeError, match=message):
        run(moe, tokens)
