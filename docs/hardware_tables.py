"""Writes the tables of hardware.md: what `workbench memory` computes for every model of the family.

    python docs/hardware_tables.py

Nothing is downloaded and nothing is measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from workbench.config import ModelConfig
from workbench.memory import CHUNK, config_of, predict, record_bytes
from workbench.models.room import GIB, Memory

PAGE = Path(__file__).parent / "hardware.md"
# One name per size; the others of the family (base, instruct, thinking, 4 and 4.1) have the same sizes.
MODELS = {"8B": "llm-jp-4-8b-thinking", "33B": "llm-jp-4-33b-thinking", "32B-A3B": "llm-jp-4-32b-a3b-thinking"}
BUNDLED = ("nano-dense-thinking", "nano-moe-thinking")
CONTEXTS = (4_096, 16_384, 65_536)
CARDS = (16, 24, 32, 48, 80, 141)
USABLE = 0.9  # of a card; the rest is for its driver, the allocator and what an experiment holds besides
RECORDS = ("routing", "router_logits", "resid_post", "expert_out")


def tables() -> dict[str, str]:
    """The tables of the page by the name that stands in its markers."""
    return {"needs": needs(), "fits": fits(), "records": records(), "bundled": bundled()}


def needs() -> str:
    """Weights, and cache and memory at once for each context."""
    head = ["model", "experts", "weights", *(f"{name} at {n:,}" for n in CONTEXTS for name in ("cache", "all"))]
    rows = []
    for name, cfg, experts in _variants():
        sizes = [predict(cfg, n, experts=experts) for n in CONTEXTS]
        rows.append([name, _format(cfg, experts), _gib(sizes[0].weights)])
        rows[-1] += [_gib(n) for size in sizes for n in (size.cache, size.resident)]
    return _markdown(head, rows)


def fits() -> str:
    """The longest context of one sequence that fits on each card."""
    head = ["model", "experts", *(f"{card} GB" for card in CARDS)]
    rows = [
        [name, _format(cfg, experts), *(_longest(cfg, experts, card) for card in CARDS)]
        for name, cfg, experts in _variants()
    ]
    return _markdown(head, rows)


def records() -> str:
    """What recording keeps: bytes of one position, and GiB of 65,536 of them."""
    head = ["model", *(f"`{name}`" for name in RECORDS)]
    rows = []
    for name, full in MODELS.items():
        cfg, cells = config_of(full), []
        for record in RECORDS:
            size = record_bytes(cfg, [record], torch.bfloat16) if cfg.is_moe or record == "resid_post" else None
            cells.append("–" if size is None else f"{size / 1000:,.1f} kB; {_gib(size * CONTEXTS[-1])}")
        rows.append([name, *cells])
    return _markdown(head, rows)


def bundled() -> str:
    """The small models that ship with the repository, in float32."""
    rows = []
    for name in BUNDLED:
        cfg = config_of(name)
        needed = predict(cfg, cfg.n_ctx, dtype=torch.float32)
        rows.append([f"`{name}`", f"{cfg.n_ctx:,}", f"{needed.weights / 2**20:.1f}", f"{needed.resident / 2**20:.1f}"])
    return _markdown(["model", "context", "weights, MiB", "all, MiB"], rows)


def written(page: str) -> str:
    """The page with every table between its markers computed anew."""
    for name, table in tables().items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, n_found = pattern.subn(lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", page)
        if n_found != 1:
            raise SystemExit(f"{PAGE.name}: expected one place for the table {name!r}, got {n_found}.")
    return page


def _variants() -> Iterator[tuple[str, ModelConfig, str]]:
    for name, full in MODELS.items():
        cfg = config_of(full)
        for experts in ("plain", "int8", "int4") if cfg.is_moe else ("plain",):
            yield name, cfg, experts


def _format(cfg: ModelConfig, experts: str) -> str:
    if not cfg.is_moe:
        return "none; all bf16"
    return "bf16" if experts == "plain" else experts


def _longest(cfg: ModelConfig, experts: str, card: int) -> str:
    def fits(context: int) -> bool:
        needed: Memory = predict(cfg, context, experts=experts, chunk=min(CHUNK, context))
        return needed.resident <= USABLE * card * GIB

    if not fits(1):
        return "no"
    low, high = 1, cfg.n_ctx + 1  # `low` fits, `high` is too long or beyond the model
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return f"{low:,}" + (" (all)" if low == cfg.n_ctx else "")


def _gib(n: int) -> str:
    return f"{n / GIB:.1f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ["---"] + ["---" if head[1] == "experts" else "---:"] + ["---:"] * (len(head) - 2)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, align, *rows))


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
