"""What studies of the bundled models found, as a page: `python data/nano/findings.py RUN ... [--dense NAME ...]`.

RUN: directories that `workbench study` wrote. Their tables, and what silencing neurons of the dense models does, are
written between the markers of docs/findings.md; README.md takes its numbers from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
from measure_neurons import measure
from recipe import HERE
from tables import table, write_findings

from workbench import load_model
from workbench.axes import EFFORTS, LANGUAGES
from workbench.capture import suitable_threads
from workbench.io.runs import Run
from workbench.stats.matching import match_tokens
from workbench.study.languages import contrast
from workbench.study.remarks import remarks
from workbench.study.report import summarise

PAGE = HERE.parents[1] / "docs" / "findings.md"
Row = tuple[str, str, str]
Frames = dict[str, pl.DataFrame]


def of_run(run: Run) -> str:
    """Markdown about one run: a table of numbers, then sentences of its report."""
    tokens = run.tokens.collect()
    frames = summarise(run, tokens)
    model, counts = run.manifest["model"], run.manifest["counts"]
    rows = [*layers(frames), *languages(run, tokens, frames), *causes(frames), *modes(frames), *drift(frames)]
    said = [text for text in remarks(frames).values() if text]
    return "\n".join(
        [
            f"### {model['name']}",
            "",
            f"Weights {model['weights_hash'][:12]}; {counts['n_docs']:,} conversations or texts, "
            f"{counts['n_groups']:,} prompt groups, {counts['n_tokens']:,} tokens.",
            "",
            table(["what", "where", "value [95%]"], rows),
            "",
            *(f"- {text}" for text in said),
            "",
        ]
    )


def shown(row: dict[str, Any], value: str, low: str = "low", high: str = "high", form: str = ".3f") -> str:
    return f"{row[value]:{form}} [{row[low]:{form}}, {row[high]:{form}}]"


def layers(frames: Frames) -> Iterator[Row]:
    """What differs from layer to layer: divergence of the languages, bits, neighbours."""
    for row in frames["divergence"].sort("layer").iter_rows(named=True):
        value = shown(row, "excess", "excess_low", "excess_high")
        yield "JA-EN divergence beyond the floor, bits", f"layer {row['layer']}", value
    bits = frames["bits"]
    for (layer,), part in bits.sort("layer").group_by("layer", maintain_order=True):
        residual = pl.col("factor") == "residual"
        total = part.select(pl.when(residual).then("bits").otherwise("excess").sum()).item()
        for row in part.iter_rows(named=True):
            value = (
                f"{row['bits']:.3f} ({row['bits'] / total:.0%})"
                if row["factor"] == "residual"
                else shown(row, "excess")
            )
            yield f"bits of {total:.2f} by {row['factor']}", f"layer {layer}", value
    for row in frames["persistence"].sort("layer").iter_rows(named=True):
        yield "experts in common with the next token", f"layer {row['layer']}", shown(row, "overlap")
        gap = shown(row, "word_gap", "word_gap_low", "word_gap_high")
        yield "... beyond the same words elsewhere", f"layer {row['layer']}", gap


def languages(run: Run, tokens: pl.DataFrame, frames: Frames) -> Iterator[Row]:
    """Experts that differ between the languages: on all words, on shared words, without the space, found again."""
    certain = frames["contrasts"].filter(pl.col("p_adjusted") < 0.05)
    yield "experts that differ on all words", f"of {len(frames['contrasts'])}", str(len(certain))
    flagged = frames["shared"].filter("flagged")
    yield "beyond the floors on shared words", f"of {len(frames['shared'])}", str(len(flagged))
    for row in flagged.sort(pl.col("risk_difference").abs(), descending=True).head(1).iter_rows(named=True):
        yield "... the largest, JA - EN", place(row), shown(row, "risk_difference", form="+.3f")
    spaced = contrast(run, match_tokens(tokens, "lang", LANGUAGES), "lang", LANGUAGES).filter("flagged")
    yield "... if the space were a word", "", str(len(spaced))
    for row in spaced.sort(pl.col("risk_difference").abs(), descending=True).head(1).iter_rows(named=True):
        yield "... the largest then, JA - EN", place(row), shown(row, "risk_difference", form="+.3f")
    found = frames["replication"]
    yield "beyond the floors on the discovery half", "", str(len(found))
    yield "... that differ again on the other half", "", str(found["replicated"].sum())


def causes(frames: Frames) -> Iterator[Row]:
    """What removal shows of the flagged experts."""
    removed = frames["audit"].filter(kind="reroute")
    if removed.is_empty():
        yield "experts beyond the floors on shared words or on all", "", "0"
        return
    matter = removed.filter(pl.col("p_kl_adjusted") <= 0.05)
    yield "experts beyond the floors on either that were removed", f"{removed['n_groups'][0]} groups", str(len(removed))
    alone, controls = removed.filter(pl.col("p_kl") <= 0.05), f"{removed['n_controls'].to_numpy().max()} controls"
    yield "... that matter more than their controls, one by one", controls, str(len(alone))
    yield "... after correction", f"least p {removed['least_p'].to_numpy().min():.2f}", str(len(matter))


def modes(frames: Frames) -> Iterator[Row]:
    """Effort and channel: the header alone, what was written freely, and how much."""
    for name in ("swap_effort", "swap_channel", "free_effort", "free_channel"):
        if name not in frames:
            continue
        frame = frames[name].sort(pl.col("risk_difference").abs(), descending=True)
        certain, flagged = frame.filter(pl.col("p_adjusted") < 0.05), frame.filter("flagged")
        yield f"{name}: significant, beyond the floors", f"of {len(frame)}", f"{len(certain)}, {len(flagged)}"
        for row in frame.head(1).iter_rows(named=True):
            yield f"{name}: the largest", place(row), shown(row, "risk_difference", form="+.3f")
    if "lengths" in frames:
        written = frames["lengths"].filter(segment="analysis").sort("lang", pl.col("effort").cast(pl.Enum(EFFORTS)))
        for row in written.iter_rows(named=True):
            yield "tokens of thinking", f"{row['lang']} {row['effort']}", shown(row, "mean", form=".1f")


def drift(frames: Frames) -> Iterator[Row]:
    """Against the checkpoint that `--compare` named."""
    if "drift" not in frames:
        return
    for row in frames["drift"].sort("layer").iter_rows(named=True):
        yield "chosen experts in common with the other checkpoint", f"layer {row['layer']}", shown(row, "overlap")
        yield "... by chance, with these loads", f"layer {row['layer']}", f"{row['null']:.3f}"
    for row in frames["routers"].sort("layer").iter_rows(named=True):
        yield "cosine of matched router rows, mean", f"layer {row['layer']}", f"{row['cosine']:.3f}"


def place(row: dict[str, Any]) -> str:
    return f"layer {row['layer']}, expert {row['expert']}"


def of_neurons(name: str) -> str:
    """Markdown about the neurons of a dense model."""
    model = load_model(name, dtype="float32", progress=False)
    with suitable_threads(model):
        found: dict[str, Any] = measure(model)
    rows = [("neurons that fire at other rates in the languages", f"of {found['neurons']:,}", f"{found['differ']:,}")]
    for lang in LANGUAGES:
        cost = found[f"{lang}_neurons"]
        for of in ("ja", "en", "ja - en"):
            value, low, high = cost[of]
            rows.append((f"loss without the {lang} neurons, nats", of, f"{value:.3f} [{low:.3f}, {high:.3f}]"))
        least, most = cost["random ja - en"]
        rows.append(("... of random sets", "ja - en", f"{least:.3f} to {most:.3f}"))
        rows.append((f"... p of the {lang} neurons", "ja - en", f"{cost['p']:.3f}"))
    return "\n".join([f"### {name}", "", table(["what", "where", "value [95%]"], rows), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="What studies of the bundled models found.")
    parser.add_argument("runs", type=Path, nargs="+", help="directories of finished studies")
    parser.add_argument("--dense", nargs="*", default=["nano-dense-thinking", "nano-dense-base"])
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    made = [*(of_run(Run.open(run)) for run in args.runs), *map(of_neurons, args.dense)]
    write_findings(args.page, made, "", ("torch", "polars"))


if __name__ == "__main__":
    main()
