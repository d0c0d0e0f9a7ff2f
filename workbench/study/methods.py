"""Counts and policies of every statistic of the page, as sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import polars as pl

from workbench.plots.experts import AXES
from workbench.study.measures import N_DRAWS
from workbench.study.wording import counted

Frames = dict[str, pl.DataFrame]


def methods(tokens: pl.DataFrame, frames: Frames) -> list[str]:
    """One sentence for each kind of statistic: on how much it rests, how many tests it corrects for, and how."""
    languages = tokens.group_by("group_id").agg(n=pl.col("lang").n_unique())
    paired = int((languages["n"] == 2).sum())
    return [
        f"{paired} of {counted(len(languages), 'prompt group')} {'is' if paired == 1 else 'are'} in both languages: "
        "load maps count all groups, contrasts and divergences only those.",
        *_contrasts(frames),
        *_preferences(frames["preferences"]),
        *_pairs(frames),
        *_others(tokens, frames),
        *_audit(frames),
    ]


def software(sittings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence where a run was continued under other software than it was begun with."""
    versions = [sitting.get("versions", {}) for sitting in sittings]
    used = {name: list(dict.fromkeys(each[name] for each in versions if name in each)) for name in chain(*versions)}
    mixed = [f"{name} {' and '.join(found)}" for name, found in used.items() if len(found) > 1]
    if not mixed:
        return []
    return [f"The run was measured under different software ({'; '.join(mixed)}): its parts may differ by that."]


def _contrasts(frames: Frames) -> Iterator[str]:
    parts = {
        "shared": "Shared words",
        "contrasts": "All tokens",
        "swap_effort": "Effort header alone",
        "swap_channel": "Channel header alone",
        "free_effort": "Analysis written at high and low effort",
        "free_channel": "Analysis and final written",
    }
    for name, what in parts.items():
        if name in frames:
            row = frames[name].row(0, named=True)
            yield (
                f"{what}: {row['n_groups']} groups, {row['n_tokens']:,} tokens, {row['n_tests']:,} tests; sign flips "
                "over groups with the largest |t| over all layers and experts (max-T), intervals by Student's t."
            )


def _preferences(preferences: pl.DataFrame) -> Iterator[str]:
    if preferences.is_empty():
        return
    for (axis,), part in preferences.group_by("axis", maintain_order=True):
        part = part.filter(pl.col("p_adjusted").is_finite())
        if part.is_empty():
            yield f"Preferences by {AXES[str(axis)]}: no test, since hardly a group shares a value with another."
            continue
        designs, n_units = part["design"].unique().sort().to_list(), part["n_units"].to_numpy()
        yield (
            f"Preferences by {AXES[str(axis)]}: {part['value'].n_unique()} values, {n_units.min()} to {n_units.max()} "
            f"groups, {len(part):,} tests, {' or '.join(designs)} groups; max-T over layers and experts, "
            "Bonferroni over values."
        )


def _pairs(frames: Frames) -> Iterator[str]:
    """Pairs, steps and paths, which rest on the same groups; nothing for a layer of one expert."""
    if not frames["pairs"].is_empty():
        row = frames["pairs"].row(0, named=True)
        yield (
            f"Pairs of experts: {row['n_docs']:,} documents of evenly spread groups, {row['n_tokens']:,} tokens, "
            f"{row['n_tests']:,} tests; the largest |z| over all pairs and layers, against {N_DRAWS} deals of the "
            "experts within every document. Intervals of pairs and steps: delete-a-group jackknife, of single pairs: "
            "those picked for their size would come out smaller in other text."
        )
    if "steps" in frames:
        row, about = frames["steps"].row(0, named=True), frames["path_entropy"].row(0, named=True)
        yield (
            f"Steps: the same tokens, {row['n_tests']:,} tests, {N_DRAWS} deals of the next layer's routes within "
            f"every document. Paths: {about['n_tokens']:,} tokens, every path of a group once; 99 exchanges of what "
            "follows among those that meet at an expert."
        )


def _others(tokens: pl.DataFrame, frames: Frames) -> Iterator[str]:
    efforts = tokens["effort"].drop_nulls().n_unique()
    once = " of one effort, since a prompt read again at another is no other text" if efforts > 1 else ""
    row = frames["persistence"].row(0, named=True)
    yield (
        f"Bits, words, neighbours, tokens in a row, likeness of layers, pairs and steps rest on the documents{once}. "
        f"Neighbours: {row['n_groups']} groups, "
        f"{row['n_pairs']:,} pairs of tokens, {row['n_word_pairs']:,} of them with the same two words in another group."
    )
    row = frames["vocabulary"].row(0, named=True)
    yield (
        f"Words: {row['n_types']:,} that occur at least 20 times, {row['n_tokens']:,} tokens of {row['n_docs']:,} "
        "documents."
    )
    yield (
        f"Evenness, margins, tokens in a row and likeness of layers: {frames['auxiliary']['n_units'][0]} groups at "
        "most, delete-a-group jackknife; for the likeness of layers pairs of tokens are drawn from different groups."
    )
    if "events" in frames:
        turns = frames["events_mean"].unique(["turn", "value"], maintain_order=True)
        shown = ", ".join(
            f"{row['turn']}: {row['n_events']:,} against {row['n_controls']:,} places, {row['n_groups']} groups"
            for row in turns.filter(value=turns["value"][0]).iter_rows(named=True)
        )
        yield (
            f"Turns: {shown}; groups that have every place on both sides. Sign flips over groups, max-T over the "
            "places of a turn, and in tables/events over its layers too; not over turns and values."
        )
    if "stability" in frames:
        yield "Half samples: 100 random halves of the groups; discovery and validation: halves by a hash of the group."
    if not frames.get("geometry", pl.DataFrame()).is_empty():
        row = frames["geometry"].row(0, named=True)
        yield (
            f"Likeness by geometry: {row['n_docs']} documents of {row['n_units']} groups, {row['n_pairs']:,} pairs; "
            "labels exchanged for p, jackknife over the groups of both documents for intervals."
        )
    if "divergence" in frames:
        yield (
            "Divergence: 40 random halves of the groups for floor and excess; bits: 20 shuffles of each factor within "
            "the ones before it; fertility: jackknife over groups."
        )
    if "committee" in frames:
        row = frames["committee"].row(0, named=True)
        yield (
            f"Committee: {row['n_conditions']} topics, {row['n_units']} groups, delete-a-group jackknife with the "
            "committee held fixed."
        )


def _audit(frames: Frames) -> Iterator[str]:
    audit = frames.get("audit", pl.DataFrame())
    if audit.is_empty():
        return
    row, n_controls = audit.row(0, named=True), int(audit["n_controls"].to_numpy().max())
    yield (
        f"Audit: {len(audit.filter(kind='reroute'))} flagged experts, of shared words first, then of all, those with "
        f"the largest differences; {row['n_docs']} conversations of {row['n_groups']} groups; controls are up to "
        f"{n_controls} other experts of the layer, each once, on at most as many token-slots and compared per slot, so "
        f"that p is at least {1 / (n_controls + 1):.3f}; Holm over the {row['n_tests']} experts of an intervention, so "
        f"that a corrected p is at least {audit['least_p'].to_numpy().min():.2f}."
    )
