"""The conditions of an evaluation under intervention: run once each, written as they come, read when they are there.

A condition's file is named by what was changed, so that a run that was stopped continues and nothing is computed twice.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import workbench
from workbench.axes import LANGUAGES
from workbench.capture import capture_routing, suitable_threads
from workbench.errors import RunError
from workbench.evals.adapter import WorkbenchLM
from workbench.evals.harness import evaluate, load_tasks
from workbench.evals.languages import item_language
from workbench.evals.scoring import Changes
from workbench.evals.targets import plain
from workbench.experiments.identity import describe_model
from workbench.interventions import Intervention
from workbench.io.run_files import atomic, check_same, write_text

LOAD_BATCH = 32
SOFTWARE = ("lm_eval", "torch", "polars")
_ELSEWHERE = ("dataset_path", "dataset_name", "dataset_kwargs", "metadata")  # where items lie; they count themselves


@dataclass(frozen=True)
class AblatePlan:
    """tasks: names. n_controls: matched random changes per target; the smallest p is 1 / (1 + n_controls). metric: to
    judge by, None for "logprob" where tasks have it. limit: first N items of each task."""

    tasks: tuple[str, ...]
    n_controls: int = 39
    metric: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False
    n_resamples: int = 2000
    seed: int = 0
    include_path: str | None = None

    def __post_init__(self) -> None:
        if self.n_controls < 0 or self.n_resamples < 1:
            raise RunError(f"controls, resamples: expected 0 or more, got {self.n_controls}, {self.n_resamples}.")


class Ablator:
    """Runs conditions on one model and one set of tasks, and keeps them under `out`."""

    def __init__(self, lm: WorkbenchLM, plan: AblatePlan, out: str | Path) -> None:
        if lm.changes.items:
            raise RunError("lm: expected one without interventions, got some. Name them as a target.")
        self.lm, self.plan, self.out = lm, plan, Path(out)
        self.tasks = load_tasks(plan.tasks, plan.include_path)
        self.rows: list[dict[str, Any]] = []
        self._load: np.ndarray | None = None
        (self.out / "conditions").mkdir(parents=True, exist_ok=True)
        self.manifest = self._admit()

    def run(self, name: str, role: str, items: Sequence[Intervention], **about: Any) -> pl.DataFrame:
        """The condition's items, computed or read; noted under `name` with what else is said `about` it."""
        change = plain(items)
        key = hashlib.sha256(json.dumps(change, sort_keys=True).encode()).hexdigest()[:16]
        file = self.out / "conditions" / f"{key}.parquet"
        if not file.is_file():
            found = self._evaluate(items)
            with atomic(file) as temporary:
                found.write_parquet(temporary, metadata={"interventions": json.dumps(change)})
        self.rows.append({"condition": name, "role": role, "key": key, **about})
        return pl.read_parquet(file).with_columns(condition=pl.lit(name))

    def _evaluate(self, items: Sequence[Intervention]) -> pl.DataFrame:
        plan = self.plan
        self.lm.changes = Changes(tuple(items))
        try:
            found = evaluate(self.lm, self.tasks, limit=plan.limit, num_fewshot=plan.num_fewshot, chat=plan.chat)
        finally:
            self.lm.changes = Changes()
        return found.items

    def load(self) -> np.ndarray:
        """[layer expert] share of the tokens that choose the expert, over all items' texts, without a change."""
        if self._load is None:
            self._load = expert_load(self.lm, [text for texts in self._by_lang().values() for text in texts])
        return self._load

    def load_by_lang(self) -> dict[str, np.ndarray]:
        return {lang: expert_load(self.lm, texts) for lang, texts in self._by_lang().items() if texts}

    def _by_lang(self) -> dict[str, list[str]]:
        texts: dict[str, list[str]] = {lang: [] for lang in (*LANGUAGES, "mixed")}
        for name, task in self.tasks["tasks"].items():
            for doc in list(task.eval_docs)[: self.plan.limit]:
                texts[item_language(doc, name) or "mixed"].append(_right_text(task, doc))
        return texts

    def _admit(self) -> dict[str, Any]:
        """The manifest of what this directory holds; raises RunError when it holds something else."""
        plan, lm = self.plan, self.lm
        wanted = {
            "format": 2,
            **describe_model(lm.model),
            "tokenizer": lm.model.tokenizer.hash,
            "task_names": sorted(self.tasks["tasks"]),
            "tasks": {name: _task_hash(task, plan.limit) for name, task in sorted(self.tasks["tasks"].items())},
            "settings": {
                "limit": plan.limit, "num_fewshot": plan.num_fewshot, "chat": plan.chat, "effort": lm.effort,
                "date": lm.date, "add_bos": lm.add_bos, "answers": lm.answers, "max_length": lm.max_length,
                "batch_size": lm.batch_size, "seed": lm.seed, "score_in_final": lm.score_in_final,
                "max_gen_toks": lm.max_gen_toks,
            },
        }  # fmt: skip
        file = self.out / "manifest.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            check_same(self.out, found, wanted)
            return dict(found)
        software = {"workbench": workbench.__version__, "python": platform.python_version()}
        manifest = wanted | {"software": software | {name: version(name) for name in SOFTWARE}}
        write_text(file, json.dumps(manifest, ensure_ascii=False, indent=1) + "\n")
        return manifest


def expert_load(lm: WorkbenchLM, texts: Sequence[str]) -> np.ndarray:
    """[layer expert] share of the texts' tokens that choose the expert, without interventions."""
    model = lm.model
    n_layers, n_experts = model.cfg.n_layers, int(getattr(model.cfg, "n_experts", 0))
    counts, n_tokens = np.zeros((n_layers, n_experts)), 0
    rows = sorted((lm.tok_encode(text)[-model.cfg.n_ctx :] for text in texts), key=len)
    with suitable_threads(model):
        for start in range(0, len(rows), LOAD_BATCH):
            routing = capture_routing(model, rows[start : start + LOAD_BATCH])
            n_tokens += len(routing.expert_ids)
            for place, layer in enumerate(routing.layers):
                counts[layer] += np.bincount(routing.expert_ids[:, place].ravel(), minlength=n_experts)
    return counts / max(n_tokens, 1)


def _right_text(task: Any, doc: dict[str, Any]) -> str:
    """What a model reads when it answers the item rightly."""
    before, target = task.doc_to_text(doc), task.doc_to_target(doc)
    if isinstance(target, int) and task.config.doc_to_choice is not None:
        target = task.doc_to_choice(doc)[target]
    parts = (before, task.config.target_delimiter, target)
    return "".join(part for part in parts if isinstance(part, str))


def _task_hash(task: Any, limit: int | None) -> str:
    """Over the items, how they are asked and how answers are judged; functions count by their source."""
    config = task.config.to_dict(keep_callable=True)  # else a partial comes as text, its address in it
    asked = {name: value for name, value in config.items() if name not in _ELSEWHERE}
    parts = [asked, *list(task.eval_docs)[:limit]]
    text = "\n".join(json.dumps(part, sort_keys=True, ensure_ascii=False, default=_plainly) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plainly(value: Any) -> Any:
    """What a function does, without where it lies."""
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return str(getattr(value, "__name__", type(value).__name__))
