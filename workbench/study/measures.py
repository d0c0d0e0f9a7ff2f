"""What else a run shows: preferences, neighbours in the text and in depth, companions, standing committees.

And whether the language finding would be found again: on the other half of the prompt groups, and on any half.
"""

from __future__ import annotations

import polars as pl

from workbench.axes import LANGUAGES
from workbench.io.runs import Run
from workbench.stats.balance import auxiliary_loss, balance_by_scope, margin_summary
from workbench.stats.baselines import committee
from workbench.stats.coactivation import coactivation, cross_layer
from workbench.stats.divergence import top_overlap
from workbench.stats.dwell import leaving_hazard
from workbench.stats.dynamics import layer_consistency, local_consistency, persistence
from workbench.stats.load import CONTENT_SEGMENTS, slot_counts
from workbench.stats.logits import logit_cells
from workbench.stats.matching import at_one_effort, fertility, match_length, with_position_bin
from workbench.stats.paths import paths
from workbench.stats.specialisation import specialisation, vocabulary_specialisation
from workbench.stats.validation import (
    discover_and_validate,
    selection_stability,
    split_half_reliability,
    without_each,
)
from workbench.study.languages import compares_languages, contrast, floors_of, has_logits, shared_words
from workbench.study.swap import SWAP_SIDES

Frames = dict[str, pl.DataFrame]
AXES = ("lang", "topic", "token_class", "segment", "effort", "phase", "position_bin")
N_DRAWS = 39  # of pairs under the null: the least p is 1 / 40
PAIR_TOKENS = 20_000  # whole prompt groups up to about so many tokens: each draw deals all of them anew
CLEAR = 0.1  # a preference of at least ten tokens in a hundred
IN_A_ROW = (4, 16, 64)  # tokens of a segment that one set of experts is to serve


def measure_frames(run: Run, tokens: pl.DataFrame) -> Frames:
    """preferences, vocabulary, persistence, in_a_row (tokens that one set of experts serves), dwell (how long
    experts stay chosen), layers (alike in how they
    sort tokens), pairs, steps (from layer to layer), paths (through all layers) and path_entropy, `evenness_frames`,
    and what applies of committee, free_effort, free_channel, and `language_measures`."""
    once = at_one_effort(tokens)
    some = some_groups(once)
    frames = {
        "preferences": preferences(run, tokens),
        "vocabulary": vocabulary_specialisation(once, run.routing, run.n_experts, seed=run.seed),
        "persistence": persistence(once, run.routing, run.n_experts, seed=run.seed),
        "in_a_row": local_consistency(once, run.routing, run.n_experts, IN_A_ROW, seed=run.seed),
        "dwell": leaving_hazard(once, run.routing, run.n_experts),
        "layers": layer_consistency(once, run.routing, seed=run.seed),
        "pairs": coactivation(some, run.routing, run.n_experts, n_draws=N_DRAWS, seed=run.seed),
    }
    steps = cross_layer(some, run.routing, run.n_experts, n_draws=N_DRAWS, seed=run.seed)
    if not steps.is_empty():  # one layer has none
        frames["steps"] = steps
        frames["paths"], frames["path_entropy"] = paths(some, run.routing, seed=run.seed)
    if has_logits(run) and tokens["topic"].n_unique() > 1:
        cells = logit_cells(run.router_logits(), tokens, ["group_id", "topic"])
        frames["committee"] = committee(cells, "topic", run.n_experts, run.manifest["model"]["k"])
    if compares_languages(tokens):
        frames |= language_measures(run, tokens)
    return frames | evenness_frames(run, tokens) | free_frames(run, tokens)


def evenness_frames(run: Run, tokens: pl.DataFrame) -> Frames:
    """auxiliary (the loss that balance is trained by, per layer and pooled), scopes (balance within a document, a
    window, a language, everything) and margins (how narrowly experts were chosen; empty where all are)."""
    k = run.manifest["model"]["k"]
    return {
        "auxiliary": auxiliary_loss(slot_counts(tokens, run.routing, ["group_id"]), run.n_experts),
        "scopes": balance_by_scope(tokens, run.routing, run.n_experts, k),
        "margins": margin_summary(tokens, run.routing),
    }


def preferences(run: Run, tokens: pl.DataFrame) -> pl.DataFrame:
    """`stats.specialisation` by every column of AXES that has two values: its columns after `axis`; value as text."""
    binned = with_position_bin(tokens, "pos_in_segment")
    content = binned.filter(pl.col("segment").is_in(CONTENT_SEGMENTS))
    frames = []
    for axis in AXES:
        if content[axis].drop_nulls().n_unique() > 1:
            found = specialisation(binned, run.routing, axis, run.n_experts, seed=run.seed)
            frames.append(
                found.select(pl.lit(axis).alias("axis"), pl.col("value").cast(pl.String), pl.exclude("value"))
            )
    return pl.concat(frames) if frames else pl.DataFrame()


def clear_preferences(preferences: pl.DataFrame) -> pl.DataFrame:
    """Those that are significant after correction and of at least CLEAR, either way, largest first."""
    if preferences.is_empty():
        return preferences
    sure = (pl.col("p_adjusted") <= 0.05) & (pl.col("difference").abs() >= CLEAR)
    return preferences.filter(sure.fill_null(False)).sort(
        pl.col("difference").abs(), descending=True, maintain_order=True
    )


def some_groups(tokens: pl.DataFrame, n_tokens: int = PAIR_TOKENS) -> pl.DataFrame:
    """The tokens of evenly spread prompt groups: all of them, or every so-manieth to hold about `n_tokens`."""
    content = tokens.filter(pl.col("segment").is_in(CONTENT_SEGMENTS))
    groups = content["group_id"].unique().sort()
    return tokens.filter(pl.col("group_id").is_in(groups.gather_every(-(-len(content) // n_tokens) or 1).to_list()))


def language_measures(run: Run, tokens: pl.DataFrame) -> Frames:
    """fertility, overlap (of the most used experts), without_topic (each topic left out), and of the shared words, or
    of all where none are shared: reliability (split halves), replication (discovered on one half of the groups, tested
    on the other), stability."""
    counts = slot_counts(tokens, run.routing, ["group_id", "lang"])
    k = run.manifest["model"]["k"]
    pair = ("lang", LANGUAGES, run.n_experts)
    frames = {"overlap": top_overlap(counts, *pair, sizes=(k, 2 * k), seed=run.seed)}
    frames["without_topic"] = without_each(counts, tokens.select("group_id", "topic").unique(), *pair)
    if compares_languages(tokens.filter(pl.col("segment") == "user")):
        frames["fertility"] = fertility(tokens, "lang", LANGUAGES)
    matched = shared_words(tokens)
    chosen = tokens if matched.is_empty() else matched
    counts = counts if matched.is_empty() else slot_counts(matched, run.routing, ["group_id", "lang"])
    frames["reliability"] = split_half_reliability(counts, *pair, top=k, seed=run.seed)
    floors = floors_of(run)
    if floors is not None:
        cells = logit_cells(run.router_logits(), chosen, ["group_id", "lang"])
        splits = tokens.select("group_id", "split")
        frames["replication"] = discover_and_validate(
            counts, splits, *pair, floors[0], logits=cells, logit_floor=floors[1], seed=run.seed
        )
        frames["stability"] = selection_stability(
            counts, *pair, floors[0], logits=cells, logit_floor=floors[1], seed=run.seed
        )
    return frames


def free_frames(run: Run, tokens: pl.DataFrame) -> Frames:
    """free_effort (the analysis written at high and at low effort) and free_channel (analysis and final).

    Paired within groups, each over as many first tokens as the shorter of the two has: of a group's answers in one
    language, or of one answer. Only where the model wrote both.
    """
    written = tokens.filter(pl.col("phase") == "decode").with_columns(answers=pl.format("{} {}", "group_id", "lang"))
    sides = {
        "effort": (written.filter(pl.col("segment") == "analysis").with_columns(side="effort"), "answers"),
        "channel": (written.with_columns(side="segment"), "doc_id"),
    }
    frames = {}
    for name, (part, unit) in sides.items():
        both = match_length(part, "side", SWAP_SIDES[name], unit)
        if not both.is_empty():
            frames[f"free_{name}"] = contrast(run, both, "side", SWAP_SIDES[name])
    return frames
