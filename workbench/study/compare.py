"""Two checkpoints on the same tokens: how far routing moved, with experts matched by their router rows."""

from __future__ import annotations

import polars as pl

from workbench.capture import routed_layers
from workbench.errors import RunError
from workbench.io.run_files import atomic
from workbench.io.runs import Run
from workbench.models import Llama
from workbench.stats.drift import match_experts, router_drift, routing_drift
from workbench.study.describe import tokenizer_of
from workbench.study.experts import read_routing, sample_documents

N_GROUPS = 24
TABLES = ("drift", "routers", "matches", "compared")


def compare_models(model: Llama, other: Llama, run: Run, batch_size: int = 16) -> dict[str, pl.DataFrame]:
    """Read conversations of a run with both checkpoints; writes compare/*.parquet into the run and returns the tables.

    Raises RunError as `check_comparable` does.
    """
    check_comparable(model, other)
    tokens = sample_documents(run, N_GROUPS)
    first, second = (read_routing(each, tokens, batch_size) for each in (model, other))
    matches = match_experts(_router_rows(model), _router_rows(other))
    tables = {
        "drift": routing_drift(tokens, first, second, matches),
        "routers": router_drift(matches),
        "matches": matches,
        "compared": pl.DataFrame({"name": [str(other.source).rstrip("/").rpartition("/")[2]]}),
    }
    folder = run.path / "compare"
    folder.mkdir(exist_ok=True)
    for name, table in tables.items():
        with atomic(folder / f"{name}.parquet") as file:
            table.write_parquet(file)
    return tables


def check_comparable(model: Llama, other: Llama) -> None:
    """Raises RunError when tokenizers or shapes differ: the same ids would be other words, the same numbers other
    experts."""
    if tokenizer_of(model).hash != tokenizer_of(other).hash or _shape(model) != _shape(other):
        raise RunError(
            f"--compare: expected the tokenizer and shape of {model.source}, got others in {other.source}. "
            "Compare checkpoints of one lineage."
        )


def read_comparison(run: Run) -> dict[str, pl.DataFrame]:
    """The tables of `compare_models`; empty when the run was compared with nothing."""
    folder = run.path / "compare"
    return {
        name: pl.read_parquet(folder / f"{name}.parquet") for name in TABLES if (folder / f"{name}.parquet").exists()
    }


def comparison_facts(frames: dict[str, pl.DataFrame]) -> dict[str, str]:
    """Sentences of the page: facts.compared and facts.routers."""
    if "routers" not in frames:
        return {"compared": "", "routers": ""}
    routers, drift = frames["routers"], frames["drift"]

    def mean(column: str) -> float:
        return float(routers[column].to_numpy().mean())

    return {
        "compared": frames["compared"]["name"][0],
        "routers": (
            f"Router rows have a mean cosine of {mean('cosine'):.3f} with their match (next best "
            f"{mean('next_cosine'):.3f}), and {mean('same'):.0%} of experts kept their number. "
            f"{drift['n_groups'][0]} groups, {drift['n_tokens'][0]:,} tokens."
        ),
    }


def _router_rows(model: Llama) -> dict:
    weights = dict(model.named_parameters())
    rows = {layer: weights[f"blocks.{layer}.mlp.router.weight"] for layer in routed_layers(model)}
    return {layer: weight.detach().float().cpu().numpy() for layer, weight in rows.items()}


def _shape(model: Llama) -> tuple:
    return (routed_layers(model), model.cfg.d_model, getattr(model.cfg, "n_experts", 0), getattr(model.cfg, "k", 0))
