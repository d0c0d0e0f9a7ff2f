"""Every measure says where it comes from, what its null is and what its interval is; the table of the docs agrees."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import workbench.stats

DOCS = Path(__file__).parents[3] / "docs" / "routing-statistics.md"
NULL = re.compile(r"\b[Nn]ulls?\b|null_|chance|p_adjusted|floor")
INTERVAL = re.compile(r"95%|interval|jackknife|Student's t")
# Frames that are no measure: counts, cells and choices of tokens that measures start from, labels put on measures, and
# the judging of the pipeline itself (docs/calibration.md).
HELPERS = {
    "load.slot_counts", "logits.logit_cells", "events.channel_changes", "events.sentence_starts",
    "dynamics.token_motion", "matching.select_tokens", "matching.at_one_effort", "matching.match_tokens",
    "matching.with_position_bin",
    "matching.match_length", "matching.matching_summary", "losses.item_losses", "contrasts.flag_experts",
    "contrasts.language_contrasts", "divergence.language_divergence", "summaries.segment_lengths",
    "summaries.group_means", "ratios.time_ratios", "index.unit_index",
}  # fmt: skip


def rows() -> list[tuple[list[str], list[str]]]:
    """(functions, cells) of every row of the table of measures that names a function."""
    table = DOCS.read_text(encoding="utf-8").split("## The measures")[1].split("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")
    ]
    named = [(re.findall(r"`(\w+\.\w+)`", row[1]), row) for row in cells if len(row) == 5]
    return [([name for name in names if not name.startswith("experiments.")], row) for names, row in named if names]


def function(name: str) -> Callable:
    module, _, attribute = name.partition(".")
    return getattr(importlib.import_module(f"workbench.stats.{module}"), attribute)


def test_every_measure_is_in_the_table() -> None:
    found = set()
    for module in pkgutil.iter_modules(workbench.stats.__path__):
        if module.name == "calibration":
            continue
        for name, value in vars(importlib.import_module(f"workbench.stats.{module.name}")).items():
            own = inspect.isfunction(value) and value.__module__.endswith(f"stats.{module.name}")
            if own and not name.startswith("_") and "DataFrame" in str(inspect.signature(value).return_annotation):
                found.add(f"{module.name}.{name}")
    listed = {name for names, _ in rows() for name in names}
    assert found - HELPERS - {"events.thought_switches"} == listed - {"losses.carries"}


@pytest.mark.parametrize(("names", "cells"), rows(), ids=lambda value: value[0] if value else "")
def test_docstrings_say_what_the_table_says(names: list[str], cells: list[str]) -> None:
    _, _, null, interval, source = cells
    texts = {name: " ".join((inspect.getdoc(function(name)) or "").split()) for name in names}
    everything = " ".join(texts.values())
    for name, text in texts.items():
        assert null == "–" or NULL.search(text), f"{name}: no null"
        assert interval == "–" or INTERVAL.search(text), f"{name}: no interval"
    known = re.findall(r"\d{4}\.\d{5}|BqyPLOkxFY|[A-Z][a-z]+(?: et al\.)? \d{4}", source)
    assert known or "project's" in source
    for citation in known:
        name, year = citation.rsplit(" ", 1) if " " in citation else ("", citation)
        assert year in everything, citation
        assert not name or name.removesuffix(" et al.") in everything, citation
