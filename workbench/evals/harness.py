"""Tasks of lm-evaluation-harness on a workbench model: names in, the harness's table and one row per item out."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import polars as pl
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from workbench.errors import RunError, WorkbenchError
from workbench.evals.adapter import WorkbenchLM
from workbench.evals.languages import item_group, item_language
from workbench.experiments.identity import describe_model
from workbench.interventions import to_json
from workbench.io.run_files import atomic, write_text

TASKS = Path(__file__).parent / "tasks"
OWN = "workbench_"
ITEM_SCHEMA = {
    "task": pl.String, "item": pl.Int64, "group": pl.String, "lang": pl.String, "effort": pl.String,
    "metric": pl.String, "higher_is_better": pl.Boolean, "value": pl.Float64,
}  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation gave.

    items: one row per item and metric (ITEM_SCHEMA). means: one row per task and metric with `n`, `mean` and `stderr`,
    as the harness computes them. results: all that the harness returns, samples among it.
    """

    items: pl.DataFrame
    means: pl.DataFrame
    results: dict[str, Any]


def load_tasks(names: Sequence[str], include_path: str | Path | None = None) -> dict[str, Any]:
    """The harness's tasks, groups, tags and patterns of these names, ours ("workbench_...") among them.

    include_path: a folder of further task files. Raises RunError for a name that does not exist and, in one line, for
    a task whose data are neither at hand nor to be had.
    """
    if not names:
        raise RunError("tasks: expected the name of one or more, got none. Try workbench_choices.")
    if include_path and not Path(include_path).is_dir():
        raise RunError(f"include_path: expected a folder of task files, got {str(include_path)!r}. Check the path.")
    folders = [TASKS, *([Path(include_path)] if include_path else [])]
    # the harness's own index is thousands of files: it is read only for tasks that are not ours
    manager = TaskManager(include_path=folders, include_defaults=not all(name.startswith(OWN) for name in names))
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        found = _load(manager, name)
        for part in loaded:
            loaded[part] |= found.get(part) or {}
    return loaded


def _load(manager: TaskManager, name: str) -> Any:
    if not manager.match_tasks([name]) and not Path(name).is_file():
        close = [task for task in manager.all_tasks if name.lower() in task][:5] or ["workbench_base"]
        raise RunError(f"tasks: expected a task of the harness, got {name!r}. Perhaps {', '.join(close)}.")
    try:
        with _quick_refusal():
            return manager.load([name])
    except WorkbenchError:
        raise
    except ModuleNotFoundError as error:
        raise RunError(f"{name}: expected the packages it needs, got {error}.") from error
    except Exception as error:  # datasets, the hub's client and the task's own code raise whatever they like
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"{name}: expected its data in the cache or from the hub, got {type(error).__name__}: {reason} "
            "Run it once while online, or point HF_DATASETS_CACHE at a cache that holds them."
        ) from error


@contextlib.contextmanager
def _quick_refusal() -> Iterator[None]:
    """Quiet retries: without a connection the one line that `_load` gives says all."""
    names = ("huggingface_hub", "huggingface_hub.utils._http", "datasets", "lm_eval")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def evaluate(
    lm: WorkbenchLM,
    tasks: Sequence[str] | dict[str, Any],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    system: str | None = None,
    gen_kwargs: dict[str, Any] | None = None,
    include_path: str | Path | None = None,
    bootstrap_iters: int = 0,
) -> Evaluation:
    """Run tasks, by name or as `load_tasks` returns them.

    limit: the first N items of every task. chat: render every item as a conversation (tasks named "workbench_..."
    are already in the form that suits them). num_fewshot, system, gen_kwargs: as in the harness. Raises RunError.
    """
    loaded = tasks if isinstance(tasks, dict) else load_tasks(tasks, include_path)
    if limit is not None and limit < 1:
        raise RunError(f"limit: expected at least 1, got {limit}.")
    if num_fewshot is not None and num_fewshot < 0:
        raise RunError(f"num_fewshot: expected 0 or more, got {num_fewshot}.")
    if chat and lm.model.chat_template is None:
        raise RunError(
            "chat: expected a model with a chat template, got one without. Ask a thinking model, or in text."
        )
    if num_fewshot and all(_own_fewshot(task) == 0 for task in loaded["tasks"].values()):
        names = ", ".join(loaded["tasks"])
        raise RunError(f"num_fewshot: expected 0 for {names}, fixed there, got {num_fewshot}. Leave it out.")
    generates = [task.get_config("output_type") == "generate_until" for task in loaded["tasks"].values()]
    if gen_kwargs and not any(generates):
        raise RunError("gen_kwargs: expected a task that generates, got those that score. Leave them out.")
    for task in loaded["tasks"].values():
        _configure(task, num_fewshot, gen_kwargs)
    lm.counts.update(dict.fromkeys(lm.counts, 0))
    results = lm_eval.evaluate(
        lm,
        loaded,
        limit=limit,
        bootstrap_iters=bootstrap_iters,
        apply_chat_template=chat,
        system_instruction=system,
        fewshot_as_multiturn=chat,
        log_samples=True,
    )
    assert results is not None  # this process is the only one
    return Evaluation(item_frame(results), mean_frame(results), {**results, "config": lm.get_model_info()})


def _own_fewshot(task: ConfigurableTask) -> int | None:
    """What the task's file says, whatever a run has set since."""
    if not hasattr(task, "own_fewshot"):
        task.own_fewshot = task.get_config("num_fewshot")
    return task.own_fewshot


def _configure(task: ConfigurableTask, num_fewshot: int | None, gen_kwargs: dict[str, Any] | None) -> None:
    """What the harness's command sets on a task before it runs."""
    own = _own_fewshot(task)
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=1234)
    if gen_kwargs and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=gen_kwargs, update=True)


def item_frame(results: dict[str, Any]) -> pl.DataFrame:
    """One row per item and metric of the harness's samples.

    A metric that is a sum and a count, such as bits_per_byte, gives their ratio; one without a number of its own per
    item (F1 over a whole task, say) is left out. Where a task filters answers in several ways, the name of the filter
    is put after the metric's.
    """
    rows = []
    for task, samples in results["samples"].items():
        better = results["higher_is_better"].get(task, {})
        filters = {sample["filter"] for sample in samples}
        for sample in samples:
            doc = sample["doc"] if isinstance(sample["doc"], dict) else {}
            known = (task, sample["doc_id"], item_group(doc, task, sample["doc_id"]), item_language(doc, task))
            for metric in sample["metrics"]:
                value = _number(sample[metric])
                if value is not None:
                    name = metric if len(filters) == 1 else f"{metric},{sample['filter']}"
                    rows.append((*known, doc.get("effort"), name, better.get(metric), value))
    return pl.DataFrame(rows, schema=ITEM_SCHEMA, orient="row")


def _number(value: Any) -> float | None:
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(part, int | float) for part in value):
        value = value[0] / value[1] if value[1] else math.nan
    if not isinstance(value, int | float) and not hasattr(value, "item"):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def mean_frame(results: dict[str, Any]) -> pl.DataFrame:
    """One row per task, metric and filter: the harness's own mean and its standard error over items."""
    rows = []
    for task, found in results["results"].items():
        n = results["n-samples"].get(task, {}).get("effective")
        for key, value in found.items():
            metric, _, rule = key.partition(",")
            if rule and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = found.get(f"{metric}_stderr,{rule}")
                rows.append((task, metric, rule, n, float(value), error if isinstance(error, float) else None))
    schema = {"task": pl.String, "metric": pl.String, "filter": pl.String, "n": pl.Int64, "mean": pl.Float64}
    return pl.DataFrame(rows, schema={**schema, "stderr": pl.Float64}, orient="row")


def markdown(found: Evaluation, lm: WorkbenchLM) -> str:
    """The table of means, and a line for everything that a reader of it should know."""
    lines = ["| task | metric | n | mean | standard error |", "| --- | --- | ---: | ---: | ---: |"]
    for task, metric, rule, n, mean, error in found.means.iter_rows():
        name = metric if rule == "none" else f"{metric} ({rule})"
        lines.append(f"| {task} | {name} | {n} | {mean:.4f} | {'' if error is None else f'{error:.4f}'} |")
    model, kinds = lm.model, ", ".join(item.kind for item in lm.changes.items) or "none"
    lines.append(f"\n{model.source}, {str(model.dtype).removeprefix('torch.')} on {model.device}, "
                 f"experts {model.moe_impl}, attention {model.attn_impl}; interventions: {kinds}")  # fmt: skip
    told = {"contexts_cut": "contexts were cut at the left", "boundaries_moved": "contexts lose tokens to what follows"}
    lines += [f"{lm.counts[name]} {text}" for name, text in told.items() if lm.counts[name]]
    return "\n".join(lines)


def write(found: Evaluation, lm: WorkbenchLM, out: str | Path) -> Path:
    """results.json (all that the harness says, without samples), samples.jsonl, means.csv and items.parquet."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: value for name, value in found.results.items() if name != "samples"}
    about = {"model": describe_model(lm.model), "counts": lm.counts, "interventions": to_json(lm.changes.items)}
    text = json.dumps(plain | {"workbench": about}, ensure_ascii=False, indent=1, default=str)
    write_text(folder / "results.json", text + "\n")
    samples = [
        json.dumps({"task": task, **sample}, ensure_ascii=False, default=str)
        for task, of_task in found.results["samples"].items()
        for sample in of_task
    ]
    write_text(folder / "samples.jsonl", "".join(line + "\n" for line in samples))
    found.means.write_csv(folder / "means.csv")
    with atomic(folder / "items.parquet") as file:
        found.items.write_parquet(file)
    return folder / "results.json"
