"""The measures of the page beyond the contrast of languages: from a run, and from hand-made frames."""

from __future__ import annotations

import polars as pl
import pytest

from workbench.io.runs import Run
from workbench.plots.dynamics import in_a_row_curves, likeness_map
from workbench.plots.experts import preference_bars
from workbench.stats.coactivation import coactivation
from workbench.stats.load import CONTENT_SEGMENTS
from workbench.stats.matching import at_one_effort
from workbench.stats.specialisation import specialisation
from workbench.study import measures
from workbench.study.atlas import _audited, _prefers, companions
from workbench.study.languages import heaviest_words, shared_words, to_audit
from workbench.study.methods import methods
from workbench.study.remarks import (
    _again,
    _committee,
    _dwell,
    _evenness,
    _geometry,
    _in_a_row,
    _margins,
    _often,
    _topics,
    _vocabulary,
    remarks,
)
from workbench.study.report import summarise


@pytest.fixture(scope="module")
def tokens(finished_run: Run) -> pl.DataFrame:
    return finished_run.tokens.collect()


@pytest.fixture(scope="module")
def frames(finished_run: Run, tokens: pl.DataFrame) -> dict[str, pl.DataFrame]:
    return measures.measure_frames(finished_run, tokens)


def test_preferences_are_those_of_every_axis_with_two_values(
    finished_run: Run, tokens: pl.DataFrame, frames: dict[str, pl.DataFrame]
) -> None:
    found = frames["preferences"]
    content = tokens.filter(pl.col("segment").is_in(CONTENT_SEGMENTS))
    varied = [axis for axis in measures.AXES[:-1] if content[axis].drop_nulls().n_unique() > 1]
    assert found["axis"].unique(maintain_order=True).to_list() == [*varied, "position_bin"]
    alone = specialisation(tokens, finished_run.routing, "token_class", finished_run.n_experts, seed=finished_run.seed)
    here = found.filter(axis="token_class").drop("axis")
    assert here.equals(alone.select(here.columns), null_equal=True)


def preference(difference: float, p: float, axis: str = "topic", expert: int = 0) -> dict[str, object]:
    return {"axis": axis, "value": "x", "layer": 0, "expert": expert, "difference": difference, "p_adjusted": p}


def test_a_clear_preference_is_certain_and_large_either_way() -> None:
    rows = [
        preference(0.2, 0.01, expert=1),
        preference(-0.3, 0.05, "lang", expert=2),
        preference(0.9, 0.06, expert=3),
        preference(0.09, 0.001, expert=4),
        preference(0.5, float("nan"), expert=5),
    ]
    found = measures.clear_preferences(pl.DataFrame(rows))
    assert found["expert"].to_list() == [2, 1]
    bars = {trace.name: list(trace.y) for trace in preference_bars(found).data}
    assert bars == {"language": [1], "topic": [1]}
    assert measures.clear_preferences(pl.DataFrame()).is_empty()


def test_what_the_model_wrote_is_compared_over_equal_lengths(
    finished_run: Run, tokens: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[str, str], pl.DataFrame] = {}
    monkeypatch.setattr(measures, "contrast", lambda run, part, axis, sides: seen.setdefault(sides, part))
    written = tokens.filter(pl.col("phase") == "decode")
    channels = pl.when(pl.col("pos_in_segment") % 3 == 0).then(pl.lit("final")).otherwise(pl.lit("analysis"))
    pretended = tokens.with_columns(segment=pl.when(pl.col("phase") == "decode").then(channels).otherwise("segment"))
    found = measures.free_frames(finished_run, pretended)
    assert set(found) == {"free_effort", "free_channel"}
    effort, channel = seen["high", "low"], seen["analysis", "final"]
    for part, unit in ((effort, ["group_id", "lang"]), (channel, ["doc_id"])):
        sizes = part.group_by(*unit, "side").len()
        assert sizes.group_by(unit).agg(pl.col("len").n_unique())["len"].unique().to_list() == [1]
        assert set(part["phase"]) == {"decode"}
    assert set(effort["segment"]) == {"analysis"}
    assert len(channel) < len(written)
    assert not set(measures.free_frames(finished_run, tokens.filter(pl.col("phase") == "prefill")))


def test_pairs_rest_on_whole_groups_of_about_as_many_tokens_as_asked_for(tokens: pl.DataFrame) -> None:
    assert measures.some_groups(tokens).equals(tokens)
    content = tokens.filter(pl.col("segment").is_in(CONTENT_SEGMENTS))
    few = measures.some_groups(tokens, len(content) // 2)
    assert 1 <= few["group_id"].n_unique() < tokens["group_id"].n_unique()
    whole = tokens.filter(pl.col("group_id").is_in(few["group_id"].unique().to_list()))
    assert few.equals(whole)


def test_companions_are_listed_for_both_ends() -> None:
    routing = pl.DataFrame(
        {
            "doc_id": ["a"] * 60 + ["b"] * 60,
            "pos": [*range(60), *range(60)],
            "layer": 0,
            "expert_ids": [[0, 1] if pos % 2 else [2 + pos // 2 % 5, 7 - pos // 2 % 3] for pos in range(60)] * 2,
        }
    ).with_columns(pl.col("expert_ids").cast(pl.List(pl.Int64)))
    tokens = routing.select("doc_id", "pos").with_columns(segment=pl.lit("user"), group_id="doc_id")
    valid = routing.filter(pl.col("expert_ids").list.n_unique() == 2)
    kept = tokens.join(valid, on=["doc_id", "pos"], how="semi")
    pairs = coactivation(kept, valid, 8, n_draws=39)
    both = companions(pairs).filter(pl.col("expert").is_in([0, 1]))
    assert both.select("expert", "other").rows() in ([(0, 1), (1, 0)], [(1, 0), (0, 1)])


def test_remarks_and_methods_say_what_the_frames_hold(finished_run: Run, tokens: pl.DataFrame) -> None:
    frames = summarise(finished_run, tokens)
    said = remarks(frames)
    ratio = frames["fertility"]["ratio"].item()
    assert f"makes {ratio:.2f} [" in said["fertility"]
    assert frames["reliability"]["n_groups"][0] < 4  # of these texts, share a word
    assert said["again"] == ""
    assert f"of {len(frames['pairs']):,} pairs of experts" in said["companions"]
    assert said["geometry"] == ""  # needs the model
    assert f"of {len(frames['steps']):,} pairs of an expert and one of the next layer" in said["steps"]
    about = frames["path_entropy"].row(0, named=True)
    assert f"First experts make {about['n_paths']:,} paths" in said["steps"]
    assert f"the one before alone, by {about['excess']:.3f} bits (p {about['p']:.2f};" in said["steps"]
    assert said["vocabulary"] == ""  # no word of these short texts occurs 20 times at one effort
    lines = methods(tokens, frames)
    assert any(line.startswith("Pairs of experts: ") and f"{len(frames['pairs']):,} tests" in line for line in lines)
    tests = frames["preferences"].filter(pl.col("p_adjusted").is_finite(), axis="token_class").height
    assert any(line.startswith("Preferences by kind of token") and f"{tests:,} tests" in line for line in lines)
    share = frames["matching"].filter(lang="ja").row(0, named=True)
    assert share["n_tokens"] == tokens.filter(pl.col("segment").is_in(CONTENT_SEGMENTS), lang="ja").height


def test_what_would_be_found_again_counts_the_flagged_alone() -> None:
    place = {"layer": [0, 0, 1], "expert": [1, 2, 3]}
    frames = {
        "reliability": pl.DataFrame({"layer": [0, 1], "spearman": [0.4, 0.9], "n_groups": [30, 30]}),
        "contrasts": pl.DataFrame(place | {"flagged": [True, True, False]}),
        "replication": pl.DataFrame({"replicated": [True, True, True, False]}),
        "stability": pl.DataFrame(place | {"stability": [0.9, 0.7, 1.0]}),
    }
    said = _again(frames)
    assert "30 groups agree" in said
    assert "mean rank correlation 0.40 to 0.90 over layers" in said
    assert "Of 4 experts flagged on the groups kept for discovery alone 3 differ again" in said
    assert "Of the 2 flagged on all groups 1 lie beyond the floors" in said
    none = {name: frames[name].clear() for name in ("replication",)}
    none |= {"contrasts": frames["contrasts"].with_columns(flagged=pl.lit(False))}
    assert _again(frames | none).endswith(
        "No expert is flagged, on the groups kept for discovery alone or on all of them."
    )
    few = pl.DataFrame({"layer": [0], "spearman": [float("nan")], "n_groups": [3]})
    assert _again(frames | {"reliability": few}) == ""


def test_the_largest_committee_is_named_with_its_interval() -> None:
    rows = {"layer": [0, 0, 1, 1, 2], "size": [1, 1, 2, 2, 0], "coverage": [0.1, 0.1, 0.3, 0.3, 0.0]}
    rows |= {"coverage_low": [0.05, 0.05, 0.2, 0.2, 0.0], "coverage_high": [0.2, 0.2, 0.4, 0.4, 0.0]}
    frame = pl.DataFrame(rows | {"density_ratio": [1.5, 1.5, 2.5, 2.5, 0.0]})
    said = _committee({"committee": frame})
    assert said.startswith("In 2 of 3 layers some experts are among the first")
    assert "in layer 1: 2 experts 30.0% [20.0%, 40.0%], 2.5 times as much per expert" in said
    assert _committee({"committee": frame.filter(layer=2)}) == "No layer has experts that nearly every topic relies on."
    assert _committee({}) == ""


def test_geometry_says_what_it_leaves_and_where_that_is_certain() -> None:
    frame = pl.DataFrame(
        {
            "layer": [0, 1],
            "r2": [0.2, 0.6],
            "gap": [0.1, 0.2],
            "gap_residual": [0.05, -0.02],
            "gap_residual_low": [0.01, -0.04],
            "p": [0.01, 0.9],
            "n_docs": [24, 24],
        }
    )
    said = _geometry({"geometry": frame})
    assert "24 documents the cosine of their hidden states explains 20% to 60%" in said
    assert (
        "it leaves -10% to 50%, more than chance (p at most 0.05) in 1 of 2 layers; its 95% interval lies above 0 in 1."
        in said
    )
    assert _geometry({"geometry": frame.with_columns(n_docs=2)}) == ""
    assert _geometry({"geometry": frame.with_columns(gap_residual=float("nan"))}) == ""


def test_words_are_told_by_the_layers_with_most_and_least_beyond_load() -> None:
    rows = {"layer": [0, 1], "n_types": [50, 50], "specialisation": [0.9, 0.5], "null": [0.2, 0.1]}
    frame = pl.DataFrame(rows | {"excess": [0.8, 0.4], "low": [0.7, 0.3], "high": [0.9, 0.5]})
    said = _vocabulary(frame)
    assert "sends 90% of its tokens to one first expert in layer 0, where most, and 50% in layer 1" in said
    assert "make it 20% and 10%. Corrected for load that is 0.80 [0.70, 0.90] and 0.40 [0.30, 0.50]" in said


def test_a_card_judges_by_floors_and_controls_alone() -> None:
    row = {"risk_difference": -0.6, "low": -0.8, "high": -0.4, "p_adjusted": 0.0005, "flagged": False, "side": 0}
    assert _prefers([row], [], judged=False).startswith("not judged: no calibrated floors for this run (JA - EN -0.600")
    assert _prefers([row], [], judged=True).startswith("no language beyond the floors (JA - EN -0.600 [-0.800, -0.400]")
    flagged = row | {"flagged": True, "side": -1}
    assert _prefers([flagged], [{"stability": 0.9}], judged=True).endswith("; beyond the floors in 90% of half samples")
    assert _prefers([flagged], [], judged=True).startswith("English (")
    alone = row | {"low": float("nan"), "high": float("nan"), "p_adjusted": float("nan")}
    assert _prefers([alone], [], judged=True) == "no language beyond the floors (JA - EN -0.600)"
    audit = {"kl": 0.2, "control_kl": 0.1, "p_kl": 0.02, "p_kl_adjusted": 0.04, "n_controls": 39, "p_selective": 0.5}
    audit |= {"selectivity": 0.5, "selectivity_low": 0.1, "selectivity_high": 0.9}
    assert _audited(audit).startswith(
        "more than matched controls: KL 0.2000 against 0.1000 (p 0.020, adjusted 0.040, 39"
    )
    assert _audited(audit | {"p_kl": 0.06}).startswith("not certainly more than matched controls")
    assert _audited(audit | {"p_kl_adjusted": 0.3}).startswith("more than matched controls, judged by itself: KL")
    assert _audited(audit).endswith("selectivity +0.50 [+0.10, +0.90] (p 0.500)")


def test_one_reading_of_a_prompt_is_its_medium_effort() -> None:
    tokens = pl.DataFrame({"doc_id": ["a", "b", "c"], "effort": ["high", "low", "medium"]})
    assert at_one_effort(tokens)["doc_id"].to_list() == ["c"]
    assert at_one_effort(tokens.filter(pl.col("effort") != "medium"))["doc_id"].to_list() == ["b"]
    assert at_one_effort(tokens.with_columns(effort=pl.lit(None, pl.String)))["doc_id"].to_list() == ["a", "b", "c"]


def test_what_shuffles_tokens_rests_on_one_effort(finished_run: Run, tokens: pl.DataFrame, frames) -> None:
    once = at_one_effort(tokens)
    content = once.filter(pl.col("segment").is_in(CONTENT_SEGMENTS))
    assert tokens["effort"].n_unique() == 3
    assert frames["pairs"]["n_docs"][0] == content["doc_id"].n_unique() == tokens["doc_id"].n_unique() // 3
    assert frames["pairs"]["n_tokens"][0] == len(content)
    bits = summarise(finished_run, tokens)["bits"]
    assert bits["n_tokens"].unique().to_list() == [len(content)]


def test_evenness_is_told_per_layer_and_why_not_pooled() -> None:
    losses = pl.DataFrame(
        {
            "scope": ["layer 0", "layer 1", "mean of layers", "pooled"],
            "value": [3.0, 2.0, 2.5, 1.0],
            "low": [2.8, 1.9, 2.4, 0.9],
            "high": [3.2, 2.1, 2.6, 1.1],
        }
    )
    scopes = pl.DataFrame(
        {"scope": ["document", "document", "global"], "layer": [0, 1, 0], "entropy_corrected": [0.8, 0.6, 0.95]}
    )
    said = _evenness({"auxiliary": losses, "scopes": scopes})
    assert "is 2.500 [2.400, 2.600] on average over layers" in said
    assert "it would be 1.000 [0.900, 1.100]" in said
    assert said.endswith("mean over layers: 0.700 within a document, 0.950 over everything.")


def test_tokens_in_a_row_are_told_by_the_largest_gain() -> None:
    frame = pl.DataFrame(
        {
            "layer": [0, 1, 0, 1], "m": [4, 4, 16, 16], "srp": [0.9, 0.8, 0.5, 0.7], "low": [0.88, 0.78, 0.4, 0.6],
            "high": [0.92, 0.82, 0.6, 0.8], "null": [0.85, 0.75, 0.45, 0.4],
        }
    )  # fmt: skip
    said = _in_a_row(frame)
    assert "is in layer 1: one set of experts serves 16 tokens in a row with F1 0.700 [0.600, 0.800]" in said
    assert said.endswith("and as many tokens from anywhere with 0.400.")
    assert _in_a_row(frame[:0]) == ""
    same = frame.with_columns(null=pl.col("srp"))
    assert _in_a_row(same) == "No layer serves tokens in a row better than shuffled ones."
    fig = in_a_row_curves(frame)
    named = {trace.name: list(trace.y) for trace in fig.data if trace.name}
    assert named == {"4 tokens in a row": [0.9, 0.8], "16 tokens in a row": [0.5, 0.7]}
    dashed = [list(trace.y) for trace in fig.data if trace.line.dash == "dash" and not trace.name]
    assert dashed == [[0.85, 0.75], [0.45, 0.4]]


def test_layers_are_alike_both_ways() -> None:
    rows = {"layer": [1, 1, 3], "other": [3, 5, 5], "correlation": [0.5, 0.2, 0.1]}
    (cells,) = likeness_map(pl.DataFrame(rows | {"low": [0.4, 0.1, 0.0], "high": [0.6, 0.3, 0.2]})).data
    assert list(cells.x) == [1, 3, 5]
    assert cells.z[0][1] == cells.z[1][0] == 0.5
    assert cells.z[1][2] == cells.z[2][1] == 0.1
    assert list(cells.customdata[2][0]) == [0.1, 0.3]


def test_narrow_choices_are_told_with_ties() -> None:
    rows = {"layer": [0, 1], "median": [1.0, 0.5], "near_0.1": [0.05, 0.2], "near_0.1_low": [0.04, 0.1]}
    frame = pl.DataFrame(rows | {"near_0.1_high": [0.06, 0.3], "ties": [0.0, 0.0], "n_tokens": [1000, 1200]})
    said = _margins(frame)
    assert "closest in layer 1: for 20.0% [10.0%, 30.0%] of its tokens the margin is below 0.1 logits" in said
    assert said.endswith("its median is 0.50. Exact ties decide 0 of 2,200 choices of a token and layer.")
    assert "Exact ties decide 25 of 2,200" in _margins(frame.with_columns(ties=pl.Series([0.025, 0.0])))
    assert _margins(frame[:0]) == ""


def test_a_pair_is_told_with_the_interval_of_its_lift() -> None:
    row = {"together": 90, "expected": 30.0, "log2_lift": 1.585, "log2_lift_low": 1.0, "log2_lift_high": 2.0}
    assert _often(row) == "90 times against 30 expected, 3.0 [2.0, 4.0] times as often"
    few = row | {"log2_lift_low": None, "log2_lift_high": None}
    assert _often(few) == "90 times against 30 expected, 3.0 times as often"


def test_blanks_are_no_shared_words_and_the_heaviest_are_named() -> None:
    rows = [("g", lang, "user", token) for lang in ("ja", "en") for token in [" "] * 6 + ["7", "7", "."]]
    tokens = pl.DataFrame(rows, schema=["group_id", "lang", "segment", "token"], orient="row").with_columns(
        token_id=pl.col("token").replace_strict({" ": 1, "7": 2, ".": 3}), pos=pl.int_range(pl.len())
    )
    matched = shared_words(tokens)
    assert set(matched["token"]) == {"7", "."}
    assert heaviest_words(matched).rows() == [("7", pytest.approx(2 / 3), 1), (".", pytest.approx(1 / 3), 1)]


def test_the_audit_takes_what_is_flagged_on_shared_words_first() -> None:
    shared = {"layer": [0, 1], "expert": [5, 6], "risk_difference": [0.1, -0.3], "flagged": [True, True]}
    every = {
        "layer": [2, 1, 0],
        "expert": [9, 6, 1],
        "risk_difference": [0.2, 0.9, 0.8],
        "flagged": [True, True, False],
    }
    frames = {"shared": pl.DataFrame(shared), "contrasts": pl.DataFrame(every)}
    assert to_audit(frames) == [(1, 6), (0, 5), (2, 9)]


def test_what_stays_chosen_is_told_beside_its_load() -> None:
    rows = {
        "layer": [0, 0, 1, 1],
        "age": [1, 4, 1, 4],
        "n_at_risk": [900, 500, 900, 50],
        "hazard": [0.8, 0.7, 0.5, 0.4],
    }
    rows |= {"null": [0.85, 0.8, 0.7, 0.6], "excess": [0.05, 0.1, 0.2, 0.2], "excess_low": [0.04] * 2 + [0.15] * 2}
    frame = pl.DataFrame(rows | {"excess_high": [0.06] * 2 + [0.25] * 2})
    said = _dwell(frame)
    assert said.startswith("In layer 1 the next token leaves 50% of the experts just taken up, where their load alone")
    assert said.endswith("leave 70% (difference 0.200 [0.150, 0.250]).")  # too few runs of four tokens
    assert _dwell(frame.filter(layer=0)).endswith("and of those kept for four tokens 70% instead of 80%.")
    assert _dwell(frame[:0]) == ""


def test_what_hangs_on_one_topic_is_counted() -> None:
    place = {"layer": [0, 0, 1], "expert": [1, 2, 3]}
    without = {"risk_difference": [0.4, -0.4, 0.1], "least": [0.3, 0.1, 0.1], "n_labels": [5] * 3}
    frames = {
        "contrasts": pl.DataFrame(place | {"p_adjusted": [0.01, 0.02, 0.3]}),
        "without_topic": pl.DataFrame(place | without),
    }
    assert _topics(frames) == (
        " Of the 2 experts that differ significantly on all words, 1 keep at least half of their difference whichever "
        "of the 5 topics is left out."
    )
    assert _topics({"contrasts": frames["contrasts"]}) == ""
