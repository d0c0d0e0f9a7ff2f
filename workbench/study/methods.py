"""Counts and policies of every statistic of the page, as sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import polars as pl

from workbench.plots.experts import AXES
from workbench.study.languages import flagged_experts
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
        *_pairs(frames["pairs"]),
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


def _pairs(pairs: pl.DataFrame) -> Iterator[str]:
    row = pairs.row(0, named=True)
    yield (
        f"Pairs of experts: {row['n_docs']:,} documents, {row['n_tokens']:,} tokens, {row['n_tests']:,} tests; the "
        f"largest |z| over all pairs and layers, against {N_DRAWS} deals of the experts within every document."
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
    row = audit.row(0, named=True)
    yield (
        f"Audit: {len(audit.filter(kind='reroute'))} of {len(flagged_experts(frames))} flagged experts, those with the "
        f"largest differences; {row['n_docs']} conversations of {row['n_groups']} groups, {row['n_controls']} controls "
        f"per expert and intervention, so the least p is {1 / (row['n_controls'] + 1):.3f}; corrected over the "
        f"{row['n_tests']} experts of an intervention, step-down over all their draws."
    )
