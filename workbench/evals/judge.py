"""Answers for llm-jp-judge: the files that its `evaluate` reads, written without its `generate`.

`<out>/<benchmark>.jsonl` holds one object per item (ID, prompt, response, error_messages, pattern, and what its
benchmark adds), `<out>/metadata.json` the model's name. Both as llm-jp-judge 2.0.0 reads and writes them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from workbench.chat import Message, as_day, render_tokens
from workbench.errors import RunError
from workbench.evals.answer_folder import AnswerFolder
from workbench.evals.answers import final_message
from workbench.evals.scoring import Changes, Writing, write
from workbench.interventions import Intervention
from workbench.io.hub import model_name
from workbench.models import Llama
from workbench.models.sampling import row_seeds

SYSTEM = "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。"
Row = dict[str, Any]


@dataclass(frozen=True)
class Sampling:
    """As the judge's generator asks for a benchmark; categories have temperatures of their own."""

    temperature: float
    top_p: float = 1.0
    seed: int | None = None
    by_category: Mapping[str, float] = field(default_factory=dict)


_MT_TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: how its items are read from the dataset file, and how a model is asked."""

    read: Callable[[Path], list[Row]]
    sampling: Sampling
    system: str | None = SYSTEM


def _json_items(*extra: str) -> Callable[[Path], list[Row]]:
    """Items of a JSON list with ID, text and, for a reference, output."""

    def read(path: Path) -> list[Row]:
        return [_json_item(path, entry, extra) for entry in _json(path, list)]

    return read


def _json_item(path: Path, entry: Row, extra: Sequence[str]) -> Row:
    sources = {"text": "text", "reference": "output"}
    _need(path, entry, ("ID", "text", *(sources[name] for name in extra)))
    return {"ID": entry["ID"], "prompt": [entry["text"]], **{name: [entry[sources[name]]] for name in extra}}


def _question_items(path: Path) -> list[Row]:
    """Items of JSONL with question_id, category and turns, two of them in MT-Bench."""
    rows = []
    for line in _text(path).splitlines():
        if line.strip():
            entry = _json(path, dict, line)
            _need(path, entry, ("question_id", "category", "turns"))
            rows.append({"ID": entry["question_id"], "prompt": list(entry["turns"]), "category": entry["category"]})
    return rows


def _csv_items(path: Path) -> list[Row]:
    """Items of CSV with input, type, safety, eval_aspect and ng_aspect."""
    rows: list[Row] = []
    names = ("type", "safety", "eval_aspect", "ng_aspect")
    for number, entry in enumerate(csv.DictReader(_text(path).splitlines())):
        _need(path, entry, ("input", *names))
        text = [entry["input"]]
        rows.append({"ID": number, "prompt": text, "text": text, **{name: entry[name] for name in names}})
    return rows


_SAMPLED = Sampling(temperature=1.0, top_p=0.95, seed=1234)
BENCHMARKS = {
    "quality_ja": Benchmark(_json_items("text"), _SAMPLED),
    "safety_ja": Benchmark(_json_items("text", "reference"), _SAMPLED),
    "culture_ja": Benchmark(_json_items("reference"), _SAMPLED),
    "safety_borderline_ja": Benchmark(_json_items("text", "reference"), _SAMPLED, system=""),
    "safety_boundary_ja": Benchmark(_csv_items, Sampling(0.7, top_p=0.9, seed=1234), system=None),
    "mt_bench_en": Benchmark(_question_items, Sampling(0.7, by_category=_MT_TEMPERATURES)),
    "mt_bench_ja": Benchmark(_question_items, Sampling(0.7, by_category=_MT_TEMPERATURES)),
}


@dataclass(frozen=True)
class Asking:
    """How a model is asked. temperature, seed: None for what the benchmark says; max_tokens: thinking included."""

    effort: str | None = "medium"
    date: str | None = None
    max_tokens: int = 4096
    temperature: float | None = None
    seed: int | None = None
    batch_size: int = 32


def export(
    model: Llama,
    benchmarks: Mapping[str, str | Path],
    out: str | Path,
    asking: Asking | None = None,
    *,
    name: str | None = None,
    limit: int | None = None,
    interventions: Sequence[Intervention] = (),
    overwrite: bool = False,
) -> list[Path]:
    """Answer every item and write the files that the judge evaluates; returns their paths.

    benchmarks: by name (BENCHMARKS) the dataset file that the judge uses. A file that is there is kept, as the judge's
    own generator does, unless `overwrite`; `export.json` says what its answers came from, and it is only kept if they
    came from the same. A response is what stands in the final channel; where there is none it is null and
    `error_messages` says why. Each turn sees the answers to those before it. Raises RunError for a benchmark that does
    not exist, a file that does not fit, answers of another model or under other settings, a model without a chat
    template, and prompts that leave no room for `max_tokens`.
    """
    asking = asking or Asking()
    if model.chat_template is None:
        raise RunError("model: expected one with a chat template, got one without. Use a thinking model.")
    unknown = [benchmark for benchmark in benchmarks if benchmark not in BENCHMARKS]
    if unknown or not benchmarks:
        raise RunError(f"benchmark: expected some of {', '.join(BENCHMARKS)}, got {', '.join(unknown) or 'none'}.")
    if limit is not None and limit < 1:
        raise RunError(f"limit: expected at least 1, got {limit}.")
    sources = {benchmark: _rows(benchmark, Path(source))[:limit] for benchmark, source in benchmarks.items()}
    shown = name or (model_name(model.source) if model.source else "unnamed")
    folder = AnswerFolder(Path(out), shown, model, interventions)
    asking = replace(asking, date=str(as_day(asking.date or (None if overwrite else folder.date))))
    kept = [] if overwrite else [benchmark for benchmark in sources if folder.holds(benchmark)]
    wanted = {benchmark: rows for benchmark, rows in sources.items() if benchmark not in kept}
    for benchmark in kept:
        folder.check(benchmark, sources[benchmark], asking, limit)
    folder.check_others([*wanted])
    for benchmark, rows in wanted.items():
        _prompts(model, rows, 0, BENCHMARKS[benchmark], asking)  # too long ones show before anything is written over
    folder.begin([*wanted])
    for benchmark, rows in wanted.items():
        answered = answer(model, rows, BENCHMARKS[benchmark], asking, Changes(tuple(interventions)))
        folder.write(benchmark, rows, answered, asking, limit)
    return [*(folder.file(benchmark) for benchmark in sources), folder.metadata]


def _rows(benchmark: str, source: Path) -> list[Row]:
    rows = BENCHMARKS[benchmark].read(source)
    if not rows:
        raise RunError(f"{source}: expected items of {benchmark}, got none. Use the dataset that llm-jp-judge reads.")
    _check_turns(rows)
    return rows


def _check_turns(rows: Sequence[Row]) -> None:
    for row in rows:
        if not row["prompt"] or not all(isinstance(turn, str) for turn in row["prompt"]):
            raise RunError(f"item {row['ID']}: expected turns of text, got {row['prompt']!r}.")


def answer(
    model: Llama, rows: Sequence[Row], benchmark: Benchmark, asking: Asking, changes: Changes | None = None
) -> list[Row]:
    """The rows with response, error_messages and pattern, in their order; all turns of all items."""
    found = [{**row, "response": [], "error_messages": [], "pattern": []} for row in rows]
    _check_turns(found)
    for turn in range(max((len(row["prompt"]) for row in found), default=0)):
        groups: dict[float, list[Row]] = {}
        for row in found:
            if turn < len(row["prompt"]):
                groups.setdefault(_temperature(row, benchmark, asking), []).append(row)
        for temperature, chosen in groups.items():
            _answer_turn(model, chosen, turn, benchmark, replace(asking, temperature=temperature), changes)
    keys = ("ID", "prompt", "response", "error_messages", "pattern")
    return [{key: row[key] for key in (*keys, *(name for name in row if name not in keys))} for row in found]


def _temperature(row: Row, benchmark: Benchmark, asking: Asking) -> float:
    if asking.temperature is not None:
        return asking.temperature
    return benchmark.sampling.by_category.get(row.get("category", ""), benchmark.sampling.temperature)


def _answer_turn(
    model: Llama, rows: Sequence[Row], turn: int, benchmark: Benchmark, asking: Asking, changes: Changes | None
) -> None:
    prompts = _prompts(model, rows, turn, benchmark, asking)
    chosen = benchmark.sampling
    seed = asking.seed if asking.seed is not None else chosen.seed
    how = Writing(
        asking.max_tokens,
        temperature=chosen.temperature if asking.temperature is None else asking.temperature,
        top_p=chosen.top_p,
        # the seed's first row: what the item would draw if it were asked alone, as the judge's generator asks
        seed=None if seed is None else row_seeds(seed, 1)[0],
    )
    texts = write(model, prompts, how, changes, None, asking.batch_size)
    for row, prompt, ids in zip(rows, prompts, texts, strict=True):
        response, problem = _final(model, prompt, ids)
        row["response"].append(response)
        row["error_messages"].append([problem] if problem else [])
        row["pattern"].append(None)


def _prompts(model: Llama, rows: Sequence[Row], turn: int, benchmark: Benchmark, asking: Asking) -> list[list[int]]:
    """What the model reads in this turn of each row. Raises RunError where that leaves no room for an answer."""
    prompts = [_prompt(model, row, turn, benchmark, asking) for row in rows]
    for row, prompt in zip(rows, prompts, strict=True):
        if len(prompt) + asking.max_tokens > model.cfg.n_ctx:
            raise RunError(
                f"item {row['ID']}: expected at most {model.cfg.n_ctx} tokens, got {len(prompt)} in turn {turn + 1} "
                f"and {asking.max_tokens} to write. Lower --max-tokens."
            )
    return prompts


def _prompt(model: Llama, row: Row, turn: int, benchmark: Benchmark, asking: Asking) -> list[int]:
    messages = [Message("system", benchmark.system)] if benchmark.system else []
    for place in range(turn + 1):
        messages.append(Message("user", row["prompt"][place]))
        if place < turn:
            messages.append(Message("assistant", row["response"][place] or ""))
    return render_tokens(messages, model.tokenizer, effort=asking.effort, date=asking.date)


def _final(model: Llama, prompt: Sequence[int], written: Sequence[int]) -> tuple[str | None, str | None]:
    """What was answered, and what is wrong with it."""
    message = final_message(model.tokenizer, prompt, written)
    if message is not None:
        return message.content, None if message.end in ("return", "end") else "The answer was cut at max_tokens."
    return None, f"No answer in the final channel within {len(written)} tokens."


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: expected a dataset in UTF-8, got {error}. Check the path.") from None


def _json(path: Path, kind: type, text: str | None = None) -> Any:
    try:
        value = json.loads(_text(path) if text is None else text)
    except ValueError as error:
        raise RunError(f"{path}: expected JSON, got {error}. Use the dataset that llm-jp-judge reads.") from None
    if not isinstance(value, kind):
        raise RunError(f"{path}: expected a JSON {kind.__name__}, got {type(value).__name__}.")
    return value


def _need(path: Path, entry: Any, names: Sequence[str]) -> None:
    missing = [name for name in names if not isinstance(entry, Mapping) or entry.get(name) is None]
    if missing:
        raise RunError(f"{path}: expected {', '.join(names)} in every item, got one without {missing[0]}.")
