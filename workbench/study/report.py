"""From a finished run to its page: frames, statistics, figures, sentences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import polars as pl

from workbench.errors import RunError
from workbench.io.run_files import atomic, write_text
from workbench.io.runs import Run
from workbench.plots.distributions import contrast_forest, divergence_curves, layer_curves, length_bars
from workbench.plots.dynamics import event_curves, in_a_row_curves, likeness_map
from workbench.plots.experts import (
    audit_points,
    drift_curves,
    factor_bars,
    overlap_curves,
    persistence_curves,
    preference_bars,
    timeline_curves,
)
from workbench.plots.heatmaps import contrast_map, load_map
from workbench.plots.report import render_report
from workbench.plots.theme import ordered
from workbench.stats.balance import balance, load_interval
from workbench.stats.divergence import language_divergence
from workbench.stats.events import timeline
from workbench.stats.information import decompose_routing
from workbench.stats.load import CONTENT_SEGMENTS, TEMPLATE_SEGMENTS, expert_load, slot_counts
from workbench.stats.matching import at_one_effort
from workbench.stats.summaries import layer_means, segment_lengths
from workbench.study.atlas import MAX_CARDS, atlas_cards, atlas_frames
from workbench.study.compare import comparison_facts, read_comparison
from workbench.study.examples import choose_explorer
from workbench.study.experts import read_experts
from workbench.study.findings import findings
from workbench.study.languages import compares_languages, language_facts, language_frames
from workbench.study.measures import clear_preferences, measure_frames
from workbench.study.methods import methods, software
from workbench.study.moments import event_frames
from workbench.study.remarks import EVENT_VALUES, remarks
from workbench.study.swap import SWAP_SIDES, swap_frames
from workbench.study.wording import counted

Frames = dict[str, pl.DataFrame]


def write_report(run: Run | str | Path, seed: int | None = None) -> Path:
    """Compute the statistics of a finished run and write its report.html; returns the page's path.

    `seed` is that of their resampling, and is kept in the run's manifest; None takes the one kept there, at first 0.
    Raises RunError when the directory is no finished run or the seed is negative.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    seed = run.seed if seed is None else seed
    check_seed(seed)
    run.seed = seed
    tokens = run.tokens.collect()
    frames = summarise(run, tokens)
    page = render_report(
        draw(frames),
        _facts(run, tokens, frames),
        choose_explorer(run, tokens),
        _settings_table(run.manifest),
        atlas_cards(frames),
    )
    write_tables(run, frames)
    path = run.path / "report.html"
    write_text(path, page)
    return path


def check_seed(seed: int | None) -> None:
    """Raises RunError for a negative seed, which no random generator takes."""
    if seed is not None and seed < 0:
        raise RunError(f"seed: expected at least 0, got {seed}. Pass a larger number.")


def summarise(run: Run, tokens: pl.DataFrame) -> Frames:
    """Every statistic of the page by name. Template tokens are left out; the prompt group is the unit."""
    seed = run.seed
    load = run.load().filter(pl.col("segment").is_in(CONTENT_SEGMENTS))
    frames = {f"load_by_{by}": expert_load(load, [column], run.n_experts) for by, column in _PANELS.items()}
    counts = slot_counts(tokens, run.routing, ["group_id", "lang"])
    frames["load"] = load_interval(counts, ["lang"], run.n_experts)
    frames["balance"] = balance(counts, ["lang"], run.n_experts, run.manifest["model"]["k"])
    if compares_languages(tokens):
        frames["divergence"] = language_divergence(counts, run.n_experts, seed=seed)
        frames |= language_frames(run, tokens)
    frames["load_by_segment"] = frames["load_by_segment"].filter(pl.col("segment").is_in(_common_segments(load)))
    for value in ("entropy", "margin"):
        for by, column in _PANELS.items():
            segments = _common_segments(load) if by == "segment" else CONTENT_SEGMENTS
            means = layer_means(tokens, run.routing, f"router_{value}", [column], segments)
            if not means.is_empty():
                frames[f"{value}_by_{by}"] = means
    if "analysis" in set(tokens.filter(pl.col("effort").is_not_null())["segment"]):
        frames["lengths"] = segment_lengths(tokens)
        entropy = run.routing.select("doc_id", "pos", "layer", "router_entropy").collect()
        frames["timeline"] = timeline(entropy, tokens, "router_entropy")
        over_layers = entropy.group_by("doc_id", "pos", maintain_order=True).agg(pl.col("router_entropy").mean())
        frames["timeline_mean"] = timeline(over_layers.with_columns(layer=pl.lit(0)), tokens, "router_entropy")
        frames |= event_frames(run, tokens)
    frames["bits"] = decompose_routing(at_one_effort(tokens), run.routing, seed=seed)
    frames |= measure_frames(run, tokens)
    return frames | atlas_frames(run, tokens) | read_experts(run) | swap_frames(run) | read_comparison(run)


def write_tables(run: Run, frames: Frames) -> None:
    """Every statistic of the page as tables/NAME.parquet and, lists joined by spaces, tables/NAME.csv."""
    folder = run.path / "tables"
    folder.mkdir(exist_ok=True)
    for name, frame in frames.items():
        with atomic(folder / f"{name}.parquet") as file:
            frame.write_parquet(file)
        lists = pl.selectors.by_dtype(pl.List(pl.String))
        with atomic(folder / f"{name}.csv") as file:
            frame.with_columns(lists.list.join(" ")).write_csv(file)


_PANELS = {"language": "lang", "segment": "segment"}
MIN_SHARE = 0.01  # a part of the conversation with fewer of the counted tokens gets no panel or curve of its own


def _common_segments(load: pl.DataFrame) -> list[str]:
    shares = load.group_by("segment").agg(pl.col("slots").sum()).with_columns(pl.col("slots") / pl.col("slots").sum())
    return shares.filter(pl.col("slots") >= MIN_SHARE)["segment"].to_list()


def draw(frames: Frames) -> dict[str, go.Figure]:
    """The figures of the page, by the names that its template places."""
    figures = {f"load_by_{by}": load_map(frames[f"load_by_{by}"], column) for by, column in _PANELS.items()}
    even = frames["balance"].filter(measure="effective_experts")
    figures["balance"] = layer_curves(even, "lang", "effective experts", value="value")
    if "divergence" in frames:
        figures["divergence"] = divergence_curves(frames["divergence"])
        figures["forest"] = contrast_forest(frames["contrasts"])
        figures["contrast_map"] = contrast_map(frames["contrasts"])
    if "shared" in frames:
        figures["shared_forest"] = contrast_forest(frames["shared"])
        figures["shared_map"] = contrast_map(frames["shared"], mark="flagged")
    if not frames.get("audit", pl.DataFrame()).is_empty():
        figures["audit"] = audit_points(frames["audit"])
    for header, sides in SWAP_SIDES.items():
        for name in (f"swap_{header}", f"free_{header}"):
            if name in frames:
                figures[name] = contrast_map(frames[name], sides=sides, mark="flagged")
    if not frames.get("overlap", pl.DataFrame()).is_empty():
        figures["overlap"] = overlap_curves(frames["overlap"], int(frames["overlap"]["n"].min()))  # type: ignore[arg-type]
    if not (clear := clear_preferences(frames["preferences"])).is_empty():
        figures["preferences"] = preference_bars(clear)
    figures["persistence"] = persistence_curves(frames["persistence"])
    if not frames["in_a_row"].is_empty():
        figures["in_a_row"] = in_a_row_curves(frames["in_a_row"])
    if not frames["layers"].is_empty():
        figures["layers"] = likeness_map(frames["layers"])
    figures["bits"] = factor_bars(frames["bits"])
    if not frames.get("timeline_mean", pl.DataFrame()).is_empty():
        figures["timeline"] = timeline_curves(frames["timeline_mean"], "router entropy (nats)")
    for (value,), part in frames.get("events_mean", pl.DataFrame(schema=["value"])).group_by(
        "value", maintain_order=True
    ):
        figures[f"events_{value}"] = event_curves(part, f"{EVENT_VALUES[str(value)]}, difference")
    if "drift" in frames:
        figures["drift"] = drift_curves(frames["drift"])
    for value, title in (("entropy", "router entropy (nats)"), ("margin", "router margin (logits)")):
        for by, column in _PANELS.items():
            if f"{value}_by_{by}" in frames:
                figures[f"{value}_by_{by}"] = layer_curves(frames[f"{value}_by_{by}"], column, title)
    if "lengths" in frames:
        figures["lengths"] = length_bars(frames["lengths"])
    return figures


def _facts(run: Run, tokens: pl.DataFrame, frames: Frames) -> dict[str, Any]:
    model, counts = run.manifest["model"], run.manifest["counts"]
    return {
        "model": model["name"],
        "languages": ordered(tokens["lang"]),
        "segments": ordered(tokens["segment"]),
        "docs": counted(counts["n_docs"], _document_name(run)),
        "groups": counted(counts["n_groups"], "prompt group"),
        "tokens": counted(counts["n_tokens"], "token"),
        "layers": counted(counts["n_routed_layers"], "layer"),
        "answered": "decode" in set(tokens["phase"]),
        "n_experts": model["n_experts"],
        "k": model["k"],
        "n_tests": f"{counts['n_routed_layers'] * model['n_experts']:,}",
        "max_entropy": f"{math.log(model['n_experts']):.2f}",
        "findings": findings(tokens, frames, model["stop_ids"]),
        "policy": _policy(run, tokens),
        "methods": [*methods(tokens, frames), *software(run.manifest["sittings"])],
        "cards_cut": counts["n_routed_layers"] * model["n_experts"] > MAX_CARDS,
        **remarks(frames),
        **comparison_facts(frames),
        **language_facts(run, frames),
    }


def _document_name(run: Run) -> str:
    return "conversation" if run.manifest["settings"]["template"] == "harmony" else "text"


def _policy(run: Run, tokens: pl.DataFrame) -> str:
    settings, document = run.manifest["settings"], _document_name(run)
    n_content = tokens["segment"].is_in(CONTENT_SEGMENTS).sum()
    rendering = (
        "Prompts were rendered by the chat template, without adding a BOS token,"
        if settings["template"] == "harmony"
        else "Prompts were given as bare text after a BOS token"
    )
    answers = "answered greedily" if settings["max_new_tokens"] else "not answered"
    changes = settings.get("interventions", {}).get("items", [])
    changed = f"The model ran under interventions ({', '.join(item['kind'] for item in changes)}). " if changes else ""
    return (
        f"{changed}{rendering} and {answers}; routing was then read from one pass over each whole {document}. "
        f"{n_content:,} of {len(tokens):,} tokens are counted: {', '.join(TEMPLATE_SEGMENTS)} tokens are scaffolding, "
        "not content, and are left out; padding is never recorded. The prompt group is the unit of every interval. "
        "Contrasts, divergences, entropies, margins over layers, neighbours and turns weigh groups equally; load, "
        "balance, evenness, narrow choices, tokens in a row, likeness of layers, pairs, steps and paths weigh tokens. "
        f"Parts of a {document} that hold under {MIN_SHARE:.0%} of the counted tokens are not drawn on their own."
    )


def _settings_table(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """The manifest as rows (dotted name, value); of where a checkpoint lay only the name, as the page may be shared."""
    rows: list[tuple[str, str]] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}.{name}" if prefix else name, Path(inner).name if name == "source" and inner else inner)
        elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            for place, entry in enumerate(value, 1):
                walk(f"{prefix} {place}", entry)
        else:
            rows.append((prefix, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))

    walk("", {name: value for name, value in manifest.items() if name not in ("format", "status", "files")})
    return rows
