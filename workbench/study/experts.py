"""What the experts of a studied model do: what they write, what their removal does, which flagged ones matter.

These need the model, unlike everything else on the page, so they are measured once and kept in the run's directory
(experts/*.parquet); a report built later reads them. Each file appears whole or not at all; a killed study continues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch

from workbench.capture import capture_routing, expert_peaks, pad, routed_layers, router_inputs, suitable_threads
from workbench.errors import RunError
from workbench.experiments.audit import (
    AUDIT_SCHEMA,
    EFFECT_SCHEMA,
    AuditPlan,
    Place,
    audit_experts,
    removal_effects,
)
from workbench.experiments.knockout import count_experts
from workbench.hooks import HookPoint
from workbench.io.run_files import atomic
from workbench.io.runs import Run
from workbench.io.tokens import Tokenizer
from workbench.models import Llama
from workbench.stats.baselines import geometry_baseline
from workbench.stats.contribution import expert_contribution, super_experts
from workbench.stats.load import slot_counts
from workbench.stats.matching import at_one_effort
from workbench.study.describe import tokenizer_of
from workbench.study.languages import flagged_places

TABLES = ("writes", "peaks", "contribution", "geometry", "removal", "audit")
N_WORDS = 8  # that a card shows of what an expert writes
N_GROUPS = 12  # prompt groups that the interventions run on, in both languages
MAX_EXPERTS = 512  # above, only flagged experts are removed one by one
MAX_AUDITED = 24  # of more flagged experts those with the largest differences, on shared words first
KINDS = ("reroute", "force")
GEOMETRY = {
    "layer": pl.Int64,
    **{f"{name}{end}": pl.Float64 for name in ("r2", "gap", "gap_residual") for end in ("", "_low", "_high")},
    "p": pl.Float64, "n_docs": pl.Int64, "n_pairs": pl.Int64, "n_units": pl.Int64,
}  # fmt: skip
NEEDED = {"geometry": set(GEOMETRY), "audit": set(AUDIT_SCHEMA), "removal": set(EFFECT_SCHEMA)}


def measure_experts(model: Llama, run: Run, progress: bool = True) -> dict[str, pl.DataFrame]:
    """Measure what is missing of TABLES and return all of them by name."""
    folder, tokenizer = run.path / "experts", tokenizer_of(model)
    folder.mkdir(exist_ok=True)
    tokens = sample_documents(run)
    flagged = flagged_places(run, tokens=run.tokens.collect())[:MAX_AUDITED]
    steps: dict[str, Callable[[], pl.DataFrame]] = {
        "writes": lambda: expert_writes(model, tokenizer, tokens),
        "peaks": lambda: super_experts(expert_peaks(model, _sequences(tokens))),
        "contribution": lambda: _contribution(model, tokens),
        "geometry": lambda: _geometry(model, tokens),
        "removal": lambda: removal_effects(model, tokens, _removed(model, flagged), progress=progress),
        "audit": lambda: _audit(model, tokens, flagged, _read(folder, "peaks"), run.seed, progress),
    }
    with suitable_threads(model):
        for name in TABLES:
            if not (folder / f"{name}.parquet").exists():
                table = steps[name]()
                with atomic(folder / f"{name}.parquet") as file:
                    table.write_parquet(file)
    return read_experts(run)


def read_experts(run: Run) -> dict[str, pl.DataFrame]:
    """The tables that were measured for a run, by name; empty when it was made without them.

    Raises RunError for a table that another version measured and that lacks what the page needs.
    """
    folder = run.path / "experts"
    tables = {name: _read(folder, name) for name in TABLES if (folder / f"{name}.parquet").exists()}
    for name, needed in NEEDED.items():
        if name in tables and (lacking := sorted(needed - set(tables[name].columns))):
            raise RunError(
                f"{folder / name}.parquet: expected columns {', '.join(lacking)}, got a table without them, as earlier "
                "versions wrote. Delete the file and run the study again: only this table is measured anew."
            )
    return tables


def sample_documents(run: Run, n_groups: int = N_GROUPS) -> pl.DataFrame:
    """Whole conversations of evenly spread prompt groups that are in both languages, at one effort. A tokens frame."""
    chosen = at_one_effort(run.tokens)
    paired = chosen.group_by("group_id").agg(n=pl.col("lang").n_unique()).filter(pl.col("n") == 2).sort("group_id")
    groups = (paired if len(paired) else chosen.select("group_id").unique().sort("group_id"))["group_id"]
    spread = [groups[place * len(groups) // min(n_groups, len(groups))] for place in range(min(n_groups, len(groups)))]
    return chosen.filter(pl.col("group_id").is_in(spread)).sort("doc_id", "pos")


def expert_writes(model: Llama, tokenizer: Tokenizer, tokens: pl.DataFrame, batch_size: int = 16) -> pl.DataFrame:
    """The expert logit lens: the words that each expert's mean output raises most and least.

    Columns layer, expert, raises, lowers (lists of N_WORDS words), n_slots. The mean of g_e E_e(x) over the tokens that
    chose the expert goes through the final norm's weight and the unembedding, without the norm's division: only the
    order of words is shown. A direct effect: what later layers make of the output is not in it.
    """
    sums, counts = _mean_outputs(model, tokens, batch_size)  # [layer expert d_model], [layer expert]
    weight = model.unembed.weight.float() * model.ln_final.weight.float()
    rows = []
    for layer, outputs in sums.items():
        logits = (outputs / counts[layer].clamp(min=1)[:, None]) @ weight.T  # [expert d_vocab]
        logits = logits[:, : tokenizer.d_vocab] - logits[:, : tokenizer.d_vocab].mean(-1, keepdim=True)
        order = logits.argsort(-1, descending=True)
        for expert in range(len(outputs)):
            n = int(counts[layer][expert])
            ids = order[expert].tolist() if n else []
            raises, lowers = (tokenizer.to_str_tokens(part) for part in (ids[:N_WORDS], ids[::-1][:N_WORDS]))
            rows.append((layer, expert, raises, lowers, n))
    words = pl.List(pl.String)
    schema: dict[str, Any] = {
        "layer": pl.Int64,
        "expert": pl.Int64,
        "raises": words,
        "lowers": words,
        "n_slots": pl.Int64,
    }
    return pl.DataFrame(rows, schema=schema, orient="row")


def _mean_outputs(
    model: Llama, tokens: pl.DataFrame, batch_size: int
) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    n_experts, d_model = count_experts(model), model.cfg.d_model
    sums = {layer: torch.zeros(n_experts, d_model) for layer in routed_layers(model)}
    counts = {layer: torch.zeros(n_experts) for layer in sums}

    def add(layer: int, ids: torch.Tensor, out: torch.Tensor, weights: torch.Tensor) -> None:
        sums[layer].index_add_(0, ids, out.float() * weights[:, None].float())
        counts[layer] += torch.bincount(ids, minlength=n_experts)

    _visit_slots(model, tokens, batch_size, add)
    return sums, counts


@torch.inference_mode()
def _visit_slots(model: Llama, tokens: pl.DataFrame, batch_size: int, visit: Callable[..., None]) -> None:
    """Call visit(layer, expert ids [slot], outputs [slot d_model], weights [slot]) for every routed layer and batch."""
    documents = _sequences(tokens)
    for start in range(0, len(documents), batch_size):
        ids, mask = pad(documents[start : start + batch_size], left=False)
        real = mask.bool()
        seen: dict[str, torch.Tensor] = {}

        def read(tensor: torch.Tensor, hook: HookPoint, real: torch.Tensor = real, seen: dict = seen) -> None:
            leaf = hook.name.rpartition("hook_")[2]
            seen[leaf] = tensor[real.to(tensor.device)].flatten(0, 1).cpu()
            if leaf == "expert_out":
                visit(hook.layer(), seen["expert_ids"], seen["expert_out"], seen["routing_weights"])

        points = ("expert_ids", "routing_weights", "expert_out")
        names = [f"blocks.{layer}.mlp.hook_{point}" for layer in routed_layers(model) for point in points]
        with model.hooks([(name, read) for name in names]):
            model(ids.to(model.device), mask.to(model.device), stop_at_layer=model.cfg.n_layers)


def _contribution(model: Llama, tokens: pl.DataFrame) -> pl.DataFrame:
    return expert_contribution(tokens, read_routing(model, tokens, norms=True), count_experts(model))


def _geometry(model: Llama, tokens: pl.DataFrame) -> pl.DataFrame:
    """Of the documents' whole text; empty for one language, which has nothing to be told apart."""
    if tokens["lang"].n_unique() < 2:
        return pl.DataFrame(schema=GEOMETRY)
    names = tokens["doc_id"].unique(maintain_order=True).to_list()
    counts = slot_counts(tokens, read_routing(model, tokens), ["doc_id"], tokens["segment"].unique().to_list())
    hidden = router_inputs(model, names, _sequences(tokens))
    return geometry_baseline(counts, hidden, tokens, "lang", count_experts(model))


def read_routing(model: Llama, tokens: pl.DataFrame, batch_size: int = 16, norms: bool = False) -> pl.DataFrame:
    """The routing frame of one pass over the documents of a tokens frame (rows of a document together, by pos)."""
    documents = tokens.group_by("doc_id", maintain_order=True).agg("token_id", "pos")
    frames = []
    with suitable_threads(model):
        for start in range(0, len(documents), batch_size):
            part = documents.slice(start, batch_size)
            rows = part.explode("token_id", "pos")
            routing = capture_routing(model, part["token_id"].to_list(), norms=norms)
            frames.append(routing.frame(rows["doc_id"].to_list(), rows["pos"].to_list()))
    return pl.concat(frames)


def _sequences(tokens: pl.DataFrame) -> list[list[int]]:
    return tokens.group_by("doc_id", maintain_order=True).agg("token_id")["token_id"].to_list()


def _removed(model: Llama, flagged: Sequence[Place]) -> list[Place]:
    every = [(layer, expert) for layer in routed_layers(model) for expert in range(count_experts(model))]
    return every if len(every) <= MAX_EXPERTS else list(flagged)


def _audit(
    model: Llama, tokens: pl.DataFrame, flagged: Sequence[Place], peaks: pl.DataFrame, seed: int, progress: bool
) -> pl.DataFrame:
    supers = [(int(layer), int(expert)) for layer, expert in peaks.filter("super").select("layer", "expert").rows()]
    return audit_experts(model, tokens, flagged, AuditPlan(KINDS, seed=seed), exclude=supers, progress=progress)


def _read(folder: Path, name: str) -> pl.DataFrame:
    return pl.read_parquet(folder / f"{name}.parquet")
