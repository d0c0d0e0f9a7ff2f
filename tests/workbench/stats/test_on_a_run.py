"""Every measure on one real run of a small model: what capture writes is what statistics take."""

from __future__ import annotations

import polars as pl
import pytest

from workbench.capture import expert_peaks, router_inputs
from workbench.experiments.router_scores import router_scores as take_apart
from workbench.experiments.routes import counterfactual_routes
from workbench.io.prompts import Prompt
from workbench.io.runs import Run
from workbench.models import Llama
from workbench.stats import (
    balance,
    baselines,
    coactivation,
    compositions,
    contribution,
    divergence,
    drift,
    dynamics,
    events,
    information,
    logits,
    matching,
    paths,
    router_scores,
    routes,
    specialisation,
    validation,
)
from workbench.stats.contrasts import paired_contrasts
from workbench.stats.load import CONTENT_SEGMENTS, slot_counts
from workbench.study import Settings, run_study

BOTH, E, K = ("ja", "en"), 8, 2
BY = ["group_id", "lang"]


@pytest.fixture(scope="module")
def run(small: Llama, prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Run:
    settings = Settings(max_new_tokens=24, router_logits=True, norms=True, efforts=("low", "high"))
    return run_study(small, prompts, tmp_path_factory.mktemp("full"), settings)


def sequences(tokens: pl.DataFrame) -> tuple[list[str], list[list[int]]]:
    by_doc = tokens.group_by("doc_id", maintain_order=True).agg("token_id")
    return by_doc["doc_id"].to_list(), by_doc["token_id"].to_list()


def test_every_measure_takes_what_a_run_holds_and_says_on_how_much_it_rests(run: Run, small: Llama) -> None:
    tokens, routing = run.tokens.collect(), run.routing
    counts = slot_counts(tokens, routing, BY)
    cells = logits.logit_cells(run.router_logits(), tokens, BY)
    names, ids = sequences(tokens)
    splits = (
        tokens.select("group_id")
        .unique()
        .sort("group_id")
        .with_columns(
            split=pl.when(pl.int_range(pl.len()) < 3).then(pl.lit("discovery")).otherwise(pl.lit("validation"))
        )
    )
    motion = dynamics.token_motion(tokens, routing, E, window=4)
    starts, others = events.channel_changes(tokens, ("user", "plain")), tokens.filter(pl.col("pos") == 20)
    rows = {layer: block.mlp.router.weight.detach().numpy() for layer, block in enumerate(small.blocks)}
    by_doc = slot_counts(tokens, routing, ["doc_id"])
    some = tokens.filter(pl.col("doc_id").is_in(names[:6]))
    others_too = counterfactual_routes(small, some, n_positions=2, n_alternatives=2)
    found = {
        "contrasts": paired_contrasts(counts, "lang", BOTH, E, logits=cells, n_resamples=200),
        "odds": compositions.log_odds_contrasts(counts, "lang", BOTH, E, n_resamples=50),
        "clr": compositions.clr_contrasts(counts, "lang", BOTH, E, n_resamples=50),
        "lape": compositions.activation_entropy(counts, "lang", BOTH, E, n_resamples=50),
        "scores": router_scores.router_score_summary(take_apart(small, some), some, n_resamples=50),
        "routes": routes.route_regret(others_too, some, n_resamples=50),
        "divergence": divergence.paired_divergence(cells, "lang", BOTH, E, "h_js", pl.col("prob")),
        "overlap": divergence.top_overlap(counts, "lang", BOTH, E),
        "validated": validation.discover_and_validate(counts, splits, "lang", BOTH, E, 0.01, alpha=1.0),
        "halves": validation.split_half_reliability(counts, "lang", BOTH, E),
        "stability": validation.selection_stability(counts, "lang", BOTH, E, 0.1),
        "balance": balance.balance(counts, ["lang"], E, K),
        "load": balance.load_interval(counts, ["lang"], E),
        "scopes": balance.balance_by_scope(tokens, routing, E, K, window=64),
        "margins": balance.margin_summary(tokens, routing, ["lang"]),
        "information": information.decompose_routing(tokens, routing, n_shuffles=3),
        "vocabulary": specialisation.vocabulary_specialisation(tokens, routing, E),
        "persistence": dynamics.persistence(tokens, routing, E),
        "srp": dynamics.local_consistency(tokens, routing, E, lengths=(4,)),
        "layers": dynamics.layer_consistency(tokens, routing, n_pairs=2000),
        "events": events.event_average(motion, tokens, starts, others, "turnover", reach=2),
        "timeline": events.timeline(motion, tokens, "turnover", segments=("user",), n_bins=3),
        "pairs": coactivation.coactivation(tokens, routing, E, n_draws=19),
        "steps": coactivation.cross_layer(tokens, routing, E, n_draws=19),
        "paths": paths.paths(tokens, routing)[1],
        "contribution": contribution.expert_contribution(tokens, routing, E),
        "sinks": contribution.sink_experts(tokens, routing, E, n_resamples=100),
        "drift": drift.routing_drift(tokens, routing, routing),
        "flips": drift.margin_flips(tokens, routing, routing),
        "anchors": baselines.anchor_pmi(tokens, routing, starts, E),
        "geometry": baselines.geometry_baseline(by_doc, router_inputs(small, names, ids), tokens, "lang", E, 19),
        "retrieval": baselines.translation_retrieval(counts, "lang", BOTH, E),
        "matched": matching.matching_summary(tokens, matching.match_tokens(tokens, "lang", BOTH), "lang"),
        "fertility": matching.fertility(tokens, "lang", BOTH),
    }
    for name, frame in found.items():
        assert not frame.is_empty(), name
        assert any(column.startswith("n_") for column in frame.columns), name
    for column in ("lang", "topic", "token_class", "segment", "effort", "phase", "position_bin"):
        binned = matching.with_position_bin(tokens, "pos_in_segment")
        frame = specialisation.specialisation(binned, routing, column, E, n_resamples=50)
        assert {"n_units", "n_tokens", "n_tests"} <= set(frame.columns), column
    assert drift.router_drift(drift.match_experts(rows, rows))["same"].to_list() == [1.0, 1.0]
    assert not contribution.super_experts(expert_peaks(small, ids[:4])).is_empty()
    assert not baselines.committee(cells, "lang", E, K).is_empty()
    scopes = balance.auxiliary_loss(counts.filter(pl.col("lang") == "ja"), E)["scope"].to_list()
    assert scopes == ["layer 0", "layer 1", "mean of layers", "pooled"]


def test_padding_enters_no_statistic(run: Run, small: Llama, prompts: list[Prompt], tmp_path) -> None:
    """The same documents in batches of one, which need no padding, give the same frames."""
    settings = Settings(max_new_tokens=0, efforts=("low",))
    padded = run_study(small, prompts, tmp_path / "a", settings)
    alone = run_study(small, prompts, tmp_path / "b", Settings(max_new_tokens=0, efforts=("low",), batch_size=1))
    first, second = (slot_counts(one.tokens, one.routing, BY, CONTENT_SEGMENTS) for one in (padded, alone))
    assert first.equals(second)
