"""Our own tasks run offline; the command prints and writes what it measured; foreign tasks run once data are there."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pytest

from tests.checkpoints import run_python
from workbench.cli import _parser, main
from workbench.errors import ChatError, RunError
from workbench.evals import conditions
from workbench.evals.adapter import WorkbenchLM
from workbench.evals.harness import TASKS, evaluate, item_frame, load_tasks
from workbench.models import Llama


def test_importing_the_workbench_imports_no_harness() -> None:
    script = (
        "import sys, workbench, workbench.cli, workbench.evals, workbench.evals.scoring, workbench.evals.judge\n"
        "workbench.cli._parser()\n"
        "print([name for name in ('lm_eval', 'datasets', 'transformers') if name in sys.modules])"
    )
    assert run_python(script).stdout.strip() == "[]"


def test_choices_of_a_base_model(base: Llama) -> None:
    found = evaluate(WorkbenchLM(base, progress=False), ["workbench_choices"], limit=6)
    assert found.items.columns == ["task", "item", "group", "lang", "effort", "metric", "higher_is_better", "value"]
    wide = found.items.pivot("metric", index=["task", "item", "lang"], values="value")
    assert len(wide) == 4 * 6
    assert (wide["logprob"] < 0).all()
    assert (wide["acc"] == (wide["margin"] > 0)).all()
    assert (found.items["lang"] == found.items["task"].str.slice(-2)).all()
    means = found.items.group_by("task", "metric").agg(pl.col("value").mean())
    joined = found.means.join(means, on=["task", "metric"])
    assert len(joined) == 12
    assert (joined["mean"] - joined["value"]).abs().max() < 1e-9
    facts = found.means.filter(pl.col("task").str.starts_with("workbench_facts"), pl.col("metric") == "acc")
    assert facts["mean"].min() > 0.5  # 0.25 is chance


def test_a_thinking_model_answers_at_its_effort(thinking: Llama) -> None:
    names = ["workbench_answers_facts_ja_low", "workbench_reference_facts_ja_low"]
    found = evaluate(WorkbenchLM(thinking, progress=False), names, limit=8)
    assert set(found.items["effort"]) == {"low"}
    wide = found.items.pivot(["task", "metric"], index="item", values="value")
    answered, exact = (wide[column] for column in wide.columns if "answers" in column or '"acc"' in column)
    assert answered.mean() > 0.5
    assert (exact <= answered).all()  # greedy thinking that is the reference leads to the reference's answer


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change = tmp_path / "change.json"
    change.write_text(
        json.dumps({"format": 1, "interventions": [{"kind": "set_activation", "value": 0.0, "point": "mlp_out"}]})
    )
    command = ["eval", "nano-dense-base", "--tasks", "workbench_facts_en", "--limit", "4", "--bootstrap", "20"]
    assert main([*command, "--out", str(tmp_path / "plain")]) == 0
    printed = capsys.readouterr().out
    assert "| workbench_facts_en | acc | 4 |" in printed
    assert "interventions: none" in printed
    assert main([*command, "--out", str(tmp_path / "changed"), "--intervention", str(change)]) == 0
    assert "interventions: set_activation" in capsys.readouterr().out
    plain, changed = (pl.read_parquet(tmp_path / name / "items.parquet") for name in ("plain", "changed"))
    before, after = (frame.filter(pl.col("metric") == "logprob")["value"].mean() for frame in (plain, changed))
    assert after < before - 1  # a model without its MLPs knows no facts
    results = json.loads((tmp_path / "plain" / "results.json").read_text())
    assert results["workbench"]["model"]["runs"]["dtype"] == "float32"
    assert len((tmp_path / "plain" / "samples.jsonl").read_text("utf-8").splitlines()) == 4


def one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(command) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("workbench:")]
    return line


def test_a_task_that_does_not_exist_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = one_line(["eval", "nano-dense-base", "--tasks", "workbench_fact"], capsys)
    assert "expected a task of the harness, got 'workbench_fact'. Perhaps workbench_" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_fewshot": -1}, "num_fewshot: expected 0 or more"),
        ({"num_fewshot": 3}, "num_fewshot: expected 0 for workbench_facts_ja, fixed there, got 3"),
        ({"gen_kwargs": {"temperature": 0.5}}, "gen_kwargs: expected a task that generates"),
        ({"include_path": "no such folder"}, "include_path: expected a folder of task files"),
        ({"chat": True}, "chat: expected a model with a chat template"),
    ],
)
def test_options_without_effect_are_refused(base: Llama, options: dict, message: str) -> None:
    with pytest.raises(RunError, match=message):
        evaluate(WorkbenchLM(base, progress=False), ["workbench_facts_ja"], limit=1, **options)


def test_tasks_may_be_run_again_with_examples(base: Llama) -> None:
    tasks = load_tasks(["workbench_facts_ja"])
    for task in tasks["tasks"].values():
        task.set_config(key="num_fewshot", value=None)
    evaluate(WorkbenchLM(base, progress=False), tasks, limit=1)
    evaluate(WorkbenchLM(base, progress=False), tasks, limit=1, num_fewshot=0)
    (task,) = tasks["tasks"].values()
    assert task.get_config("num_fewshot") == 0
    assert task.own_fewshot is None  # so that a later run may ask for some


def test_functions_of_a_task_count_by_what_they_do_not_where_they_lie() -> None:
    first, second = (partial(json.dumps, indent=indent) for indent in (1, 1))
    shown = [json.dumps(one, default=conditions._plainly) for one in (first, second, partial(json.dumps, indent=2))]
    assert shown[0] == shown[1] != shown[2]
    assert " at 0x" not in shown[0]
    assert "def dumps" in shown[0]


def test_a_date_that_is_none_is_refused(base: Llama) -> None:
    with pytest.raises(ChatError, match="date: expected YYYY-MM-DD, got 'foo'"):
        WorkbenchLM(base, date="foo")


def test_data_that_cannot_be_had_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = one_line(["eval", "nano-dense-base", "--tasks", "mgsm_direct_ja"], capsys)
    assert "mgsm_direct_ja: expected its data" in line
    assert "while online" in line


def test_metrics_that_are_a_sum_and_a_count_give_their_ratio() -> None:
    sample = {
        "doc_id": 0,
        "doc": {},
        "filter": "none",
        "metrics": ["a", "b", "c"],
        "a": (-6.0, 3),
        "b": True,
        "c": (1, [2]),
    }
    frame = item_frame({"samples": {"t": [sample]}, "higher_is_better": {"t": {"a": False}}})
    assert frame.select("metric", "higher_is_better", "value").rows() == [("a", False, -2.0), ("b", None, 1.0)]


# Foreign tasks, with data of their schema in place of the hub's.
def problem(n: int) -> dict[str, Any]:
    total = f"{n} + {n + 1} = {2 * n + 1}"
    return {
        "question": f"問題：りんごが{n}個、みかんが{n + 1}個あります。全部でいくつですか。",
        "answer": f"ステップごとの答え：{total}。答えは{2 * n + 1}です。",
        "answer_number": 2 * n + 1,
        "equation_solution": total,
    }


def quiz(n: int) -> dict[str, Any]:
    choices = {f"choice{m}": choice for m, choice in enumerate(("鳥", "魚", "虫", "花", "木"))}
    return {"q_id": n, "question": f"{n}番目の仲間は何ですか。", "label": n % 5, **choices}


def passage(n: int) -> dict[str, Any]:
    return {
        "id": str(n), "title": "首都", "context": "首都 [SEP] フランスの首都はパリです。", "is_impossible": False,
        "question": "首都はどこですか。", "answers": {"text": ["パリ"], "answer_start": [8]},
    }  # fmt: skip


MGSM, QUIZ, PASSAGES = ([make(n) for n in range(6)] for make in (problem, quiz, passage))
PAIRS = [{"sentence1": "犬がいる。", "sentence2": "動物がいる。", "label": n % 3} for n in range(6)]
REVIEWS = [{"sentence": "とても良い。", "label": n % 2, "review_id": str(n)} for n in range(6)]
WINOGRAD = [{"answer": str(n % 2 + 1), "sentence1": "犬は大きい。", "sentence2": "猫は大きい。"} for n in range(6)]
JAQKET = [
    {"qid": str(n), "question": "首都は？", "answers": {"text": ["パリ"]}, "ctxs": {"text": ["首都はパリ。"]}}
    for n in range(6)
]
STUBS: dict[tuple[str, str | None], list[dict[str, Any]]] = {
    ("juletxara/mgsm", "ja"): MGSM,
    ("juletxara/mgsm", "en"): MGSM,
    ("Rakuten/JGLUE", "JCommonsenseQA"): QUIZ,
    ("Rakuten/JGLUE", "JNLI"): PAIRS,
    ("Rakuten/JGLUE", "JSQuAD"): PASSAGES,
    ("Rakuten/JGLUE", "MARC-ja"): REVIEWS,
    ("polm-stability/xwinograd-ja", None): WINOGRAD,
    ("kumapo/JAQKET", "v2.0"): JAQKET,
}


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets from JSON files of a temporary folder, under the names that the tasks ask the hub for."""
    original = datasets.load_dataset

    def load(path: str, name: str | None = None, **kwargs: Any) -> Any:
        if (path, name) not in STUBS:
            return original(path, name, **kwargs)
        file = tmp_path / f"{path.replace('/', '-')}-{name}.json"
        file.write_text(json.dumps(STUBS[path, name], ensure_ascii=False), encoding="utf-8")
        splits = dict.fromkeys(("train", "validation", "test"), str(file))
        return original("json", data_files=splits, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_mgsm_and_the_japanese_leaderboard_run(stubs: None, thinking: Llama, chat: bool) -> None:
    leaderboard = ("jcommonsenseqa", "jnli", "jsquad", "marc_ja", "mgsm", "xwinograd", "jaqket_v2")
    names = [
        "mgsm_direct_ja",
        "mgsm_native_cot_ja",
        "mgsm_direct_en",
        *(f"ja_leaderboard_{name}" for name in leaderboard),
    ]
    loaded = load_tasks(names)
    assert set(loaded["tasks"]) == set(names)
    lm = WorkbenchLM(thinking, progress=False, max_gen_toks=16, effort="low")
    found = evaluate(lm, loaded, limit=2, num_fewshot=1, chat=chat)
    assert set(found.items["task"]) == set(names)
    assert found.items.filter(pl.col("task") != "mgsm_direct_en")["lang"].unique().to_list() == ["ja"]
    samples = found.results["samples"]
    prompt = samples["ja_leaderboard_jcommonsenseqa"][0]["arguments"][0][0]
    assert prompt.startswith("<|start|>system") == chat
    assert "- 鳥\n- 魚" in prompt
    assert "りんごが" in samples["mgsm_direct_ja"][0]["arguments"][0][0]


@pytest.mark.slow
def test_a_package_that_a_task_needs_is_named() -> None:
    try:
        import neologdn  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(RunError, match="ja_leaderboard_xlsum: expected"):
            load_tasks(["ja_leaderboard_xlsum"])


GUIDE = (Path(__file__).resolve().parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def guide_blocks(language: str) -> list[str]:
    return [text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.M | re.S) if kind == language]


def test_the_guides_commands_exist() -> None:
    lines = [line for block in guide_blocks("") for line in block.splitlines()]
    own = [line for line in lines if not line.startswith("workbench serve")]
    assert len(own) >= 9
    for line in own:
        program, *arguments = shlex.split(line)
        assert program == "workbench"
        assert _parser().parse_args(arguments).run.__module__ == "workbench.evals.commands"
    for script in re.findall(r"`python (data/\S+\.py)`", GUIDE):
        assert (Path(__file__).resolve().parents[3] / script).is_file()


def test_the_guides_python_runs() -> None:
    (block,) = guide_blocks("python")
    names: dict[str, Any] = {}
    exec(compile(block, "evaluation.md", "exec"), names)
    assert len(names["found"].items) == 8 * 3


def test_the_guide_names_every_task() -> None:
    known = {path.stem for path in TASKS.glob("*.yaml")}
    named: set[str] = set()
    for pattern in re.findall(r"^\| `(workbench_\S+)` \|", GUIDE, re.M):
        options = [part.split(",") for part in re.findall(r"\{(.*?)\}", pattern)]
        named |= {re.sub(r"\{.*?\}", "{}", pattern).format(*chosen) for chosen in itertools.product(*options)}
    assert named == known
