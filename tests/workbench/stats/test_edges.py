"""Runs with next to nothing in them: every measure gives a frame, null where there is no number, or one clear error."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import polars as pl
import pytest

from workbench.errors import FrameError
from workbench.stats.balance import (
    auxiliary_loss,
    balance,
    balance_by_scope,
    load_interval,
    lorenz_curve,
    margin_summary,
)
from workbench.stats.baselines import anchor_pmi, committee, geometry_baseline, translation_retrieval
from workbench.stats.coactivation import coactivation, cross_layer, expert_graph
from workbench.stats.compositions import activation_entropy, clr_contrasts, log_odds_contrasts
from workbench.stats.contrasts import flag_experts, paired_contrasts
from workbench.stats.contribution import attribution_summary, expert_contribution, sink_experts
from workbench.stats.divergence import paired_divergence, top_overlap
from workbench.stats.drift import decompose_drift, margin_flips, routing_drift
from workbench.stats.dynamics import layer_consistency, local_consistency, persistence, token_motion
from workbench.stats.events import channel_changes, event_average, thought_switches, timeline
from workbench.stats.information import decompose_routing, mutual_information
from workbench.stats.load import expert_load, load_balance, slot_counts
from workbench.stats.logits import logit_cells
from workbench.stats.matching import fertility, match_length, match_tokens, matching_summary
from workbench.stats.paths import paths
from workbench.stats.router_scores import router_score_summary
from workbench.stats.routes import route_regret
from workbench.stats.scripts import language_and_script
from workbench.stats.specialisation import specialisation, top_tokens, vocabulary_specialisation
from workbench.stats.summaries import layer_means, segment_lengths
from workbench.stats.validation import (
    discover_and_validate,
    equivalent_experts,
    selection_stability,
    split_half_reliability,
)

PAIR = ("ja", "en")
TEXT = ("doc_id", "group_id", "lang", "effort", "segment", "phase", "token", "topic", "token_class", "split")
NUMBERS = ("pos", "segment_index", "pos_in_segment", "token_id")
LISTS = ("expert_ids", "routing_weights", "expert_norms")
FLOATS = ("router_margin", "router_mass", "router_lse", "router_entropy")
INFINITE = {"t"}  # of differences that are all alike


class Case:
    """A run: tokens, routing, shards of logits, the number of experts and k."""

    def __init__(
        self, routed: Callable, n_groups: int = 5, n_tokens: int = 12, n_layers: int = 2, n_experts: int = 8,
        k: int = 2, langs: tuple[str, ...] = PAIR, used: int | None = None,
    ) -> None:  # fmt: skip
        rng, half, rows = np.random.default_rng(0), max(n_tokens // 2, 1), []
        for group in range(n_groups):
            for lang in langs:
                for pos in range(n_tokens):
                    segment = ("analysis", "final")[pos // half % 2]
                    text = (f"{group}-{lang}", f"g{group}", lang, "low", segment, "decode")
                    more = ("w. ", f"t{group % 2}", "latin", ("discovery", "validation")[group % 2])
                    rows.append((*text, *more, pos, pos // half, pos % half, int(rng.integers(5))))
        schema = {**dict.fromkeys(TEXT, pl.String), **dict.fromkeys(NUMBERS, pl.Int32)}
        self.tokens, self.n_experts, self.k = pl.DataFrame(rows, schema=schema, orient="row"), n_experts, k
        scores = rng.normal(size=(len(rows), n_layers, n_experts))
        scores[..., used or n_experts :] -= 100
        if rows:
            padded = np.concatenate([scores, np.full((*scores.shape[:2], 1), -1e9)], -1)  # so that k may be all
            routing = routed(self.tokens, padded, k)[1].with_columns(pl.col("pos").cast(pl.Int32))
            self.routing = routing.with_columns(router_entropy=pl.lit(1.0), expert_norms="routing_weights")
            if k == n_experts:
                self.routing = self.routing.with_columns(router_margin=pl.lit(None, pl.Float64))
        else:
            kinds = {**dict.fromkeys(LISTS, pl.List(pl.Int64)), **dict.fromkeys(FLOATS, pl.Float64)}
            self.routing = pl.DataFrame(schema={"doc_id": pl.String, "pos": pl.Int32, "layer": pl.Int64, **kinds})
        self.shards = [(self.tokens, list(range(n_layers)), scores)] if rows else []

    def counts(self, *by: str) -> pl.DataFrame:
        return slot_counts(self.tokens, self.routing, list(by))

    def measures(self) -> Iterator[tuple[str, Callable[[], pl.DataFrame]]]:
        t, r, e, k = self.tokens, self.routing, self.n_experts, self.k
        pair, few = ("lang", PAIR, e), {"n_resamples": 20}

        def counts() -> pl.DataFrame:
            return self.counts("group_id", "lang")

        def logits() -> pl.DataFrame:
            return logit_cells(self.shards, t, ["group_id", "lang"])

        def motion() -> pl.DataFrame:
            return token_motion(t, r, e, window=3)

        def at(name: str) -> pl.DataFrame:
            return channel_changes(t).filter(pl.col("event") == name)

        def load() -> pl.DataFrame:
            return expert_load(self.counts("lang"), ["lang"], e)

        yield "load", load
        yield "load_balance", lambda: load_balance(load(), ["lang"])
        yield "lorenz", lambda: lorenz_curve(load(), ["lang"])
        yield "balance", lambda: balance(counts(), ["lang"], e, k)
        yield "load_interval", lambda: load_interval(counts(), ["lang"], e)
        yield "auxiliary_loss", lambda: auxiliary_loss(self.counts("group_id"), e)
        yield "scopes", lambda: balance_by_scope(t, r, e, k, window=8)
        yield "margins", lambda: margin_summary(t, r, ["lang"])
        yield "contrasts", lambda: flag_experts(paired_contrasts(counts(), *pair, logits(), **few), 0.1, 0.5)
        yield "equivalent", lambda: equivalent_experts(paired_contrasts(counts(), *pair, **few), 0.5)
        yield "log_odds", lambda: log_odds_contrasts(counts(), *pair, **few)
        yield "clr", lambda: clr_contrasts(counts(), *pair, **few)
        yield "lape", lambda: activation_entropy(counts(), *pair, **few)
        for measure in ("jsd", "h_js", "tv"):
            yield measure, lambda measure=measure: paired_divergence(counts(), *pair, measure=measure, n_splits=3)
        yield "top_overlap", lambda: top_overlap(counts(), *pair, sizes=(1, 2, 4, 8), n_splits=3)
        yield "discover", lambda: discover_and_validate(counts(), t, *pair, 0.01, **few)
        yield "split_half", lambda: split_half_reliability(counts(), *pair, n_splits=3)
        yield "stability", lambda: selection_stability(counts(), *pair, 0.01, 5, logits=logits(), logit_floor=0.1)
        for column in ("lang", "topic", "segment", "effort"):
            yield column, lambda column=column: specialisation(t, r, column, e, **few)
        for role in ("input", "next"):
            yield role, lambda role=role: vocabulary_specialisation(t, r, e, role, min_count=2, n_draws=5)
        yield "top_tokens", lambda: top_tokens(t, r, e, min_count=1)
        yield "information", lambda: mutual_information(t, r, "lang", n_shuffles=2)
        yield "decomposed", lambda: decompose_routing(t, r, n_shuffles=2)
        yield "persistence", lambda: persistence(t, r, e)
        yield "local", lambda: local_consistency(t, r, e, lengths=(4, 256))
        yield "layers", lambda: layer_consistency(t, r, n_pairs=100)
        yield "motion", motion
        yield "events", lambda: event_average(motion(), t, at("final"), at("analysis"), "turnover", 1, 20)
        yield "switches", lambda: thought_switches(t)[1]
        yield "timeline", lambda: timeline(motion(), t, "turnover", n_bins=2)
        yield "pairs", lambda: coactivation(t, r, e)
        yield "graph", lambda: expert_graph(coactivation(t, r, e, n_draws=4))[0]
        yield "pairs and null", lambda: coactivation(t, r, e, n_draws=4)
        yield "steps", lambda: cross_layer(t, r, e, n_draws=4)
        yield "paths", lambda: paths(t, r, n_draws=4)[0]
        yield "about paths", lambda: paths(t, r, n_draws=4)[1]
        yield "contribution", lambda: expert_contribution(t, r, e)
        dla = t.select("doc_id", "pos", layer=pl.lit(0), expert=pl.lit(1), target=pl.lit("ja"), dla=pl.lit(0.5))
        yield "attribution", lambda: attribution_summary(dla, t, **few)
        yield "sinks", lambda: sink_experts(t, r, e, **few)
        yield "drift", lambda: routing_drift(t, r, r)
        yield "parts of drift", lambda: decompose_drift(t, dict.fromkeys(("aa", "bb", "ab", "ba"), r))
        yield "flips", lambda: margin_flips(t, r, r)
        yield "committee", lambda: committee(logits(), "lang", e, k)
        yield "anchors", lambda: anchor_pmi(t, r, channel_changes(t), e)
        hidden = t.select("doc_id").unique(maintain_order=True).join(pl.DataFrame({"layer": [0, 1]}), how="cross")
        states = np.random.default_rng(0).normal(size=(len(hidden), 4)).tolist()
        hidden = hidden.with_columns(mean_in=pl.Series(states, dtype=pl.List(pl.Float64)))
        yield "geometry", lambda: geometry_baseline(self.counts("doc_id"), hidden, t, "lang", e, n_shuffles=3)
        yield "retrieval", lambda: translation_retrieval(counts(), "lang", PAIR, e)
        yield "entropy", lambda: layer_means(t, r, "router_entropy", ["lang"])
        yield "lengths", lambda: segment_lengths(t)
        yield "fertility", lambda: fertility(t, "lang", PAIR, segments=("analysis",))
        yield "matched", lambda: matching_summary(t, match_tokens(t, "lang", PAIR), "lang")
        yield "of one length", lambda: match_length(t, "lang", PAIR)
        parts = {name: pl.lit(1.0) for name in ("score", "influence", "rank_change")}
        scores = r.select("doc_id", "pos", "layer", component=pl.lit("embed"), expert=pl.lit(0), **parts)
        yield "router_scores", lambda: router_score_summary(scores, t, **few)
        routes = [r.select("doc_id", "pos", "layer", route=pl.lit(n), nll=pl.lit(float(n))) for n in (0, 1)]
        yield "routes", lambda: route_regret(pl.concat(routes), t, **few)
        written = t.with_columns(writing=pl.format("{} std", "lang"))
        yield "scripts", lambda: language_and_script(slot_counts(written, r, ["group_id", "writing"]), e)


CASES = {
    "empty": {"n_groups": 0}, "one document": {"n_groups": 1, "langs": ("ja",)}, "one pair": {"n_groups": 1},
    "one language": {"langs": ("ja",)}, "one token": {"n_groups": 1, "langs": ("ja",), "n_tokens": 1},
    "one layer": {"n_layers": 1}, "experts without a token": {"used": 3},
    "every expert chosen": {"n_experts": 4, "k": 4}, "one expert": {"n_experts": 1, "k": 1},
}  # fmt: skip


def examine(name: str, measure: Callable[[], pl.DataFrame]) -> None:
    """No infinity, intervals in order, p in (0, 1]; or a FrameError; and no warning."""
    with warnings.catch_warnings(), contextlib.suppress(FrameError):
        warnings.simplefilter("error")
        _examine_frame(name, measure())


def _examine_frame(name: str, found: pl.DataFrame) -> None:
    for column, kind in found.schema.items():
        if kind != pl.Float64:
            continue
        values = found[column].to_numpy()
        assert not np.isinf(values).any() or column in INFINITE, (name, column)
        if column in ("p", "p_adjusted"):
            known = values[np.isfinite(values)]
            assert ((known > 0) & (known <= 1)).all(), (name, column)
        if column.endswith("_low") or column == "low":
            low, high = values, found[column[:-3] + "high"].to_numpy()
            assert (np.isfinite(low) == np.isfinite(high)).all(), (name, column)
            assert (low[np.isfinite(low)] <= high[np.isfinite(high)] + 1e-9).all(), (name, column)


@pytest.mark.parametrize("case", CASES)
def test_what_there_is_next_to_nothing_of(case: str, routed) -> None:
    run = Case(routed, **CASES[case])
    measures = dict(run.measures())
    for name, measure in measures.items():
        examine(f"{case}: {name}", measure)
    assert len(measures) >= 40


def test_columns_that_were_not_recorded(routed) -> None:
    run = Case(routed)
    nothing = [pl.lit(None, pl.String).alias(name) for name in ("lang", "topic", "effort")]
    run.tokens = run.tokens.with_columns(nothing, token_id=pl.lit(None, pl.Int32))
    run.routing = run.routing.with_columns(pl.lit(None, pl.Float64).alias(name) for name in FLOATS)
    for name, measure in run.measures():
        examine(f"null columns: {name}", measure)
    with pytest.raises(FrameError, match="topic: expected values, got null alone"):
        specialisation(run.tokens, run.routing, "topic", 8)
    assert margin_flips(run.tokens, run.routing, run.routing).is_empty()  # once counted as the widest margins


def test_too_few_experts_are_an_error_and_not_counted_as_those_of_the_next_layer(routed) -> None:
    run = Case(routed)
    run.n_experts = 4
    told = {name for name, measure in run.measures() if _complains(measure)}
    assert {
        "load", "balance", "load_interval", "auxiliary_loss", "scopes", "contrasts", "log_odds", "jsd", "top_overlap",
        "lang", "input", "top_tokens", "persistence", "local", "motion", "pairs", "steps", "contribution", "committee",
        "anchors", "geometry", "retrieval", "split_half", "stability", "sinks",
    } <= told  # fmt: skip


def _complains(measure: Callable[[], pl.DataFrame]) -> bool:
    try:
        measure()
    except FrameError as error:
        return "n_experts: expected at least 8, got 4" in str(error)
    return False


def test_numbers_that_used_to_be_wrong_are_null(routed) -> None:
    names = ("one document", "experts without a token", "every expert chosen")
    alone, idle, every = (Case(routed, **CASES[name]) for name in names)
    counts = alone.counts("group_id", "lang")
    reliability = split_half_reliability(counts, "lang", PAIR, 8)
    assert np.isnan(reliability.select("spearman", "reliability", "top_overlap").to_numpy()).all()  # once 0, 0 and 1
    assert selection_stability(counts, "lang", PAIR, 8, 0.01)["stability"].null_count() == 16  # once 0
    geometry = dict(alone.measures())["geometry"]()
    assert geometry.select("r2", "gap_residual", "p").null_count().row(0) == (2, 2, 2)  # p was once 0
    pairs = coactivation(idle.tokens, idle.routing, 8, n_draws=4)
    never = pairs.filter((pl.col("n_expert") == 0) | (pl.col("n_other") == 0))
    numbers = ["share", "lift", "log2_lift", "z", "p_adjusted", "log2_lift_low"]
    assert len(never) == 2 * (28 - 3)
    assert never.select(numbers).null_count().row(0) == (len(never),) * 6
    assert layer_consistency(every.tokens, every.routing)["correlation"].is_nan().all()  # all share all: once 0
    uneven = balance(counts, ["lang"], 8, 2)
    assert uneven["null"].is_finite().all()
