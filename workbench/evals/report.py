"""What an evaluation under intervention found: sentences, a table in Markdown, and a page that needs no network."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import plotly.graph_objects as go
import polars as pl

from workbench.evals.ablate import Ablation
from workbench.io.run_files import write_text
from workbench.plots.ablation import family_bars, loss_scatter, scan_map, selectivity_forest
from workbench.plots.report import render_page
from workbench.stats.losses import item_losses

LANGUAGE = {"ja": "Japanese", "en": "English"}
ALPHA = 0.05
MATCHED = (0.8, 1.25)  # controls whose load lies outside this share of the target's are said not to match


def write_report(found: Ablation) -> Path:
    """Write report.html beside the tables; returns its path."""
    page = render_page(
        "ablation.html.j2",
        draw(found),
        {"facts": facts(found), "rows": table_rows(found), "settings": _settings(found.manifest)},
    )
    path = found.path / "report.html"
    write_text(path, page)
    return path


def draw(found: Ablation) -> dict[str, go.Figure]:
    """The page's figures, by the names under which its template places them."""
    unit = unit_of(found.metric)
    figures = {}
    if not found.judged.is_empty() and found.judged["selectivity"].drop_nulls().len():
        figures["forest"] = selectivity_forest(found.judged, found.losses, found.conditions, unit)
        figures["scatter"] = loss_scatter(found.losses, found.conditions, unit)
        figures["families"] = family_bars(by_family(found), unit)
    if found.scan is not None and found.scan["selectivity"].drop_nulls().len():
        figures["scan"] = scan_map(found.scan, unit)
    return figures


def by_family(found: Ablation) -> pl.DataFrame:
    """Mean loss of each target in every family of tasks and language."""
    targets = found.judged["condition"].to_list()
    kept = found.items.filter(pl.col("condition").is_in(["baseline", *targets]), pl.col("metric") == found.metric)
    losses = item_losses(kept).filter(pl.col("lang").is_in(list(LANGUAGE)))
    means = losses.group_by("condition", "family", "lang", maintain_order=True).agg(pl.col("loss").mean(), n=pl.len())
    return means.with_columns(family=pl.col("family").str.strip_prefix("workbench_"))


def unit_of(metric: str) -> str:
    return "nats per answer" if metric == "logprob" else metric


def facts(found: Ablation) -> dict[str, Any]:
    """The numbers and sentences of the page."""
    counts = found.losses.row(0, named=True) if not found.losses.is_empty() else {}
    return {
        "model": Path(str(found.manifest["model"]["source"])).name,
        "measured": measured(found, counts),
        "findings": findings(found),
        "methods": methods(found),
        "n_scanned": 0 if found.scan is None else len(found.scan),
    }


def measured(found: Ablation, counts: dict[str, Any]) -> str:
    n_controls = found.conditions.filter(pl.col("role") == "control").height
    halves = ""
    if found.scan is not None:
        tried = f"the {len(found.scan)} experts of layers {_layers(found.scan)}"
        halves = f", the half that was not used to choose among {tried}"
    return (
        f"{counts.get('n_items_ja', 0)} Japanese and {counts.get('n_items_en', 0)} English items from "
        f"{counts.get('n_groups', 0)} facts or families of numbers{halves}; {len(found.judged)} targets tested, "
        f"{n_controls} random controls; judged by {found.metric}, in {unit_of(found.metric)}."
    )


def _layers(scan: pl.DataFrame) -> str:
    return ", ".join(map(str, scan["layer"].unique().sort()))


def findings(found: Ablation) -> list[str]:
    """One sentence per target, and what follows from all of them."""
    lines = [_finding(row, found.metric) for row in found.judged.iter_rows(named=True)]
    carried = [row for row in found.judged.iter_rows(named=True) if row["carries"] != "none"]
    if found.judged.is_empty():
        return ["Nothing was judged."]
    if found.judged["p_holm"].is_null().all():
        lines.append("Nothing was tested: that takes items in both languages, and controls. No target can carry one.")
    elif not carried:
        lines.append(
            "No target carries a language by these tests: none costs one language more than the other beyond what "
            "random experts of the same layers and load do."
        )
    lines += _unmatched(found)
    least = (
        found.judged.filter(pl.col("n_controls") > 0)
        .select(pl.col("n_tests") / (1 + pl.col("n_controls")))
        .to_series()
        .drop_nulls()
    )
    if len(least) and float(least.min()) > ALPHA:  # type: ignore[arg-type]
        lines.append(
            f"With so few controls for so many targets no corrected p can be below {float(least.min()):.2f}: "  # type: ignore[arg-type]
            "these tests could not have found anything. Take more controls or fewer targets."
        )
    return lines


def _unmatched(found: Ablation) -> list[str]:
    """A line for every target whose controls do not take about as many tokens, as the busiest experts' cannot."""
    controls = found.conditions.filter(pl.col("role") == "control").group_by("target", maintain_order=True)
    ratios = controls.agg(pl.col("load_ratio").median()).drop_nulls()
    return [
        f"{target}: its controls take {ratio:.2f} of its tokens in the median, for want of others as "
        f"{'busy' if ratio < 1 else 'idle'}; some of the difference may be load alone."
        for target, ratio in ratios.iter_rows()
        if not MATCHED[0] <= ratio <= MATCHED[1]
    ]


def _finding(row: dict[str, Any], metric: str) -> str:
    if row["selectivity"] is None:
        costs = [
            f"{row[f'loss_{lang}']:+.3f} in {name}"
            for lang, name in LANGUAGE.items()
            if row[f"loss_{lang}"] is not None
        ]
        return (
            f"{row['condition']}: costs {' and '.join(costs) or 'nothing measured'}; one language, so no selectivity."
        )
    text = (
        f"{row['condition']} ({row['experts'] or 'no experts'}): costs Japanese {_interval(row, 'loss_ja')} "
        f"and English {_interval(row, 'loss_en')} {unit_of(metric)}; selectivity {_interval(row, 'selectivity')}"
    )
    if not row["n_controls"]:
        return text + ", without controls to compare."
    text += (
        f", {row['n_controls']} controls {row['control_selectivity']:+.3f} "
        f"[{row['control_low']:+.3f} to {row['control_high']:+.3f}]; p {row['p_controls']:.3f}, "
        f"corrected for {row['n_tests']} {row['p_holm']:.3f}"
    )
    verdict = LANGUAGE.get(row["carries"])
    return text + (f". It carries {verdict}." if verdict else ". It carries neither language by these tests.")


def _interval(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:+.3f}" + ("" if low is None else f" [{low:+.3f}, {high:+.3f}]")


def methods(found: Ablation) -> list[str]:
    """How the numbers were made, for a reader who wants to repeat or doubt them."""
    lines = [
        "Loss is how much worse an item's metric is than that of the same item without a change. Items that share a "
        "fact, or a family of numbers, are one group; 95% intervals are Student's t over groups left out in turn "
        "(jackknife). Kinds of task weigh the same in both languages.",
        "Controls replace every expert by a random one of the same layer with about its load, measured on the items' "
        f"own texts. {_load_sentence(found)}",
        "A target carries a language when, at 0.05, its selectivity lies outside that of its controls (corrected by "
        "Holm's method), the languages differ over groups (signs of their jackknife pseudo-values flipped, max-T over "
        "targets), and that language loses something (interval above 0).",
    ]
    if found.scan is not None:
        lines.append(
            f"Every expert was first taken out alone, {len(found.scan)} in all, on half of the groups, chosen by a "
            "hash; the sets were judged on the other half."
        )
    return lines


def _load_sentence(found: Ablation) -> str:
    ratios = found.conditions["load_ratio"].drop_nulls().to_list()
    if not ratios:
        return ""
    low, high = min(ratios), max(ratios)
    return f"Their load was {median(ratios):.2f} of the target's in the median, from {low:.2f} to {high:.2f}."


def table_rows(found: Ablation) -> list[list[str]]:
    """The judged targets as text, a row of names first."""
    header = [
        "target",
        "experts",
        "loss JA",
        "loss EN",
        "JA - EN",
        "controls JA - EN",
        "p",
        "p Holm",
        "p items",
        "carries",
    ]
    rows = [header]
    for row in found.judged.iter_rows(named=True):
        shown = [
            _interval(row, name) if row[name] is not None else "" for name in ("loss_ja", "loss_en", "selectivity")
        ]
        spread = (
            f"{row['control_selectivity']:+.3f} [{row['control_low']:+.3f} to {row['control_high']:+.3f}]"
            if row["n_controls"]
            else ""
        )
        p_values = ["" if row[name] is None else f"{row[name]:.3f}" for name in ("p_controls", "p_holm", "p_items")]
        rows.append([row["condition"], row["experts"], *shown, spread, *p_values, row["carries"]])
    return rows


def summary(found: Ablation) -> str:
    """In Markdown: what was measured, the table, and the findings that follow from all targets."""
    header, *rows = table_rows(found)
    counts = found.losses.row(0, named=True) if not found.losses.is_empty() else {}
    lines = [measured(found, counts), "", _line(header), _line(["---"] * 2 + ["---:"] * (len(header) - 3) + ["---"])]
    lines += [_line(row) for row in rows]
    general = findings(found)[len(found.judged) :]
    return "\n".join(lines + (["", *general] if general else []))


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _settings(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """The manifest as rows; of where a checkpoint lay only the name, as the page may be shared."""
    rows: list[tuple[str, str]] = []
    for name, value in manifest.items():
        if isinstance(value, dict):
            for inner, entry in value.items():
                shown = Path(str(entry)).name if inner == "source" else str(entry)
                rows.append((f"{name}.{inner}", shown))
        else:
            rows.append((name, str(value)))
    return rows
