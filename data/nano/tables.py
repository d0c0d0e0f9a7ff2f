"""The measured figures as Markdown tables, for data/README.md."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
FINDINGS = ("<!-- findings: begin -->", "<!-- findings: end -->")
LANGUAGE_NAMES = {"ja": "Japanese", "en": "English"}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def loss_table(figures: Figures) -> str:
    """Held-out loss: a row per baseline and model, a column per language."""
    losses = figures["baselines"] | {name: found["loss"] for name, found in figures["models"].items()}
    rows = [
        [name, *(f"{by[lang]['nats_per_token']:.3f} ({by[lang]['bits_per_character']:.3f})" for lang in LANGUAGE_NAMES)]
        for name, by in losses.items()
    ]
    return table(["nats/token (bits/character)", *LANGUAGE_NAMES.values()], rows)


def completion_table(figures: Figures) -> str:
    """Base models: accuracy per task and language."""
    bases = [name for name, found in figures["models"].items() if "completion" in found]
    tasks = list(figures["models"][bases[0]]["completion"]["ja"])
    rows = [
        [task, *(percent(figures["models"][m]["completion"][lang][task]) for m in bases for lang in LANGUAGE_NAMES)]
        for task in tasks
    ]
    return table(["% correct", *(f"{model} {lang}" for model in bases for lang in LANGUAGE_NAMES)], rows)


def chat_table(found: Figures) -> str:
    """One thinking model: accuracy per task, length of the thinking and form, by language and effort."""
    cells = [
        (lang, effort, cell) for lang, efforts in found["chat"]["cells"].items() for effort, cell in efforts.items()
    ]
    rows = [[task, *(percent(cell["accuracy"][task]) for *_, cell in cells)] for task in cells[0][2]["accuracy"]]
    rows.append(["answer in the prompt's language", *(percent(cell["final_in_prompt_language"]) for *_, cell in cells)])
    rows.append(["well-formed Harmony", *(percent(cell["well_formed"]) for *_, cell in cells)])
    rows.append(["tokens of thinking (mean)", *(f"{cell['analysis_tokens']:.1f}" for *_, cell in cells)])
    return table(["% of held-out questions", *(f"{lang} {effort}" for lang, effort, _ in cells)], rows)


def relation_table(figures: Figures) -> str:
    """Thinking models: fact recall per relation and language, all efforts together."""
    models = [name for name, found in figures["models"].items() if "chat" in found]
    relations = list(figures["models"][models[0]]["chat"]["facts_by_relation"])
    rows = [
        [
            relation,
            *(
                percent(figures["models"][model]["chat"]["facts_by_relation"][relation][lang])
                for model in models
                for lang in LANGUAGE_NAMES
            ),
        ]
        for relation in relations
    ]
    return table(["% correct", *(f"{model} {lang}" for model in models for lang in LANGUAGE_NAMES)], rows)


def routing_table(found: Figures) -> str:
    """One sparse model: expert load and language divergence per layer."""
    rows = []
    for load, split in zip(found["routing"]["load"], found["routing"]["divergence"], strict=True):
        excess = f"{split['excess']:.4f} [{split['excess_low']:.4f}, {split['excess_high']:.4f}]"
        rows.append(
            [
                str(load["layer"]),
                f"{load['entropy']:.3f}",
                f"{load['smallest']:.2f}",
                f"{load['largest']:.2f}",
                str(load["dead"]),
                f"{split['between']:.4f}",
                f"{split['floor']:.4f}",
                excess,
            ]
        )
    header = ["layer", "load entropy", "smallest load", "largest load", "dead", "JSD JA-EN", "floor", "excess [95%]"]
    return table(header, rows)


def sections(figures: Figures) -> str:
    """Everything between the markers of data/README.md; models that were not measured are left out."""
    models: Figures = figures["models"]
    parts = ["#### Held-out loss", loss_table(figures)]
    if any("completion" in found for found in models.values()):
        parts += ["#### Base models: completions", completion_table(figures)]
    for name, found in models.items():
        if "chat" in found:
            parts += [f"#### {name}: answers", chat_table(found)]
    if any("chat" in found for found in models.values()):
        parts += ["#### Fact recall by relation", relation_table(figures)]
    for name, found in models.items():
        if "routing" in found:
            parts += [f"#### {name}: routing", routing_table(found)]
    return "\n\n".join(parts)


def insert(readme: str, figures: Figures) -> str:
    """The README with its figures replaced.

    Raises:
        ValueError: a marker is missing.
    """
    return between(readme, f"\n{sections(figures)}\n", BEGIN, END)


def between(page: str, text: str, begin: str, end: str) -> str:
    """The page with what stands between two markers replaced. Raises ValueError when a marker is missing."""
    if begin not in page or end not in page:
        raise ValueError(f"page: expected the markers {begin} and {end}, got a text without them. Put them back.")
    before, rest = page.split(begin, 1)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}"


def write_findings(page: Path, made: Sequence[str], in_what: str, software: Sequence[str]) -> None:
    """Replace what a page tells between its markers of findings, with the machine and the versions it was made with."""
    versions = ", ".join(f"{name} {version(name)}" for name in software)
    lines = [f"Measured{in_what} on a CPU ({platform.machine()}) with {versions}.", "", *made]
    page.write_text(between(page.read_text(encoding="utf-8"), "\n".join(lines), *FINDINGS), encoding="utf-8")
