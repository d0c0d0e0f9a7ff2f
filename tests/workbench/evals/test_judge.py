"""The files for llm-jp-judge have its published form, every turn sees the answers before it, and nothing is redone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workbench.cli import main
from workbench.errors import RunError
from workbench.evals import judge
from workbench.evals.judge import BENCHMARKS, Asking, answer, export
from workbench.evals.scoring import Changes
from workbench.interventions import KnockOut
from workbench.models import Llama

QUICK = Asking(effort="low", date="2026-01-01", max_tokens=48)
TURNS = [
    {"question_id": 81, "category": "writing", "turns": ["2 + 3 はいくつですか。", "4 + 4 はいくつですか。"]},
    {"question_id": 82, "category": "math", "turns": ["What is 1 + 2?", "What is 2 + 2?"], "reference": ["3"]},
]
SINGLE = [
    {"ID": "q-1", "text": "日本の首都はどこですか。", "output": "東京です。", "extra": 1},
    {"ID": 2, "text": "1 + 1 は？", "output": "2"},
]
SHEET = 'input,type,safety,eval_aspect,ng_aspect\n"青は何色ですか、と聞く。",P1,safe,答えること,拒むこと\n'

# What llm-jp-judge 2.0.0 declares of an item: the common fields, then those of each benchmark.
COMMON = {
    "ID": (int, str),
    "prompt": [str],
    "response": [str, type(None)],
    "error_messages": [list],
    "pattern": [type(None)],
}
FIELDS: dict[str, dict[str, Any]] = {
    "quality_ja": {"text": [str]},
    "safety_ja": {"text": [str], "reference": [str]},
    "culture_ja": {"reference": [str]},
    "safety_borderline_ja": {"text": [str], "reference": [str]},
    "safety_boundary_ja": {"text": [str], "type": str, "safety": str, "eval_aspect": str, "ng_aspect": str},
    "mt_bench_en": {"category": str},
    "mt_bench_ja": {"category": str},
}


def source(folder: Path, benchmark: str) -> Path:
    file = folder / f"{benchmark}.source"
    if benchmark.startswith("mt_bench"):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TURNS)
    elif benchmark == "safety_boundary_ja":
        text = SHEET
    else:
        text = json.dumps(SINGLE, ensure_ascii=False)
    file.write_text(text, encoding="utf-8")
    return file


def assert_fits(row: dict[str, Any], fields: dict[str, Any]) -> None:
    assert row.keys() == fields.keys()
    for name, kind in fields.items():
        if isinstance(kind, list):
            assert isinstance(row[name], list), name
            assert all(isinstance(value, tuple(kind)) for value in row[name]), name
        else:
            assert isinstance(row[name], kind), name
    n_turns = len(row["prompt"])
    assert [len(row[name]) for name in ("response", "error_messages", "pattern")] == [n_turns] * 3
    assert all(isinstance(text, str) for messages in row["error_messages"] for text in messages)
    for response, messages in zip(row["response"], row["error_messages"], strict=True):
        assert messages or response is not None


def test_every_benchmark_has_its_published_fields(thinking: Llama, tmp_path: Path) -> None:
    assert set(FIELDS) == set(BENCHMARKS)
    sources = {name: source(tmp_path, name) for name in BENCHMARKS}
    paths = export(thinking, sources, tmp_path / "out", QUICK, limit=1)
    assert [path.name for path in paths] == [*(f"{name}.jsonl" for name in BENCHMARKS), "metadata.json"]
    assert json.loads(paths[-1].read_text("utf-8")) == {"model_name": "nano-moe-thinking"}
    for name, path in zip(BENCHMARKS, paths[:-1], strict=True):
        (line,) = path.read_text("utf-8").splitlines()
        assert_fits(json.loads(line), COMMON | FIELDS[name])


def test_the_second_turn_sees_the_first_answer(thinking: Llama) -> None:
    benchmark, asked = (
        BENCHMARKS["mt_bench_ja"],
        Asking(effort="low", date="2026-01-01", max_tokens=64, temperature=0.0),
    )
    rows = [{"ID": row["question_id"], "prompt": row["turns"], "category": row["category"]} for row in TURNS]
    both = answer(thinking, rows, benchmark, asked)
    for row, found in zip(rows, both, strict=True):
        assert len(found["response"]) == 2
        assert found["ID"] == row["ID"]
        (alone,) = answer(thinking, [{**row, "prompt": row["prompt"][:1]}], benchmark, asked)
        assert alone["response"][0] == found["response"][0]
    (other,) = answer(
        thinking, [{**rows[0], "prompt": ["フランスの首都はどこですか。", TURNS[0]["turns"][1]]}], benchmark, asked
    )
    assert other["response"][0] != both[0]["response"][0]


def test_an_item_is_answered_alike_whatever_shares_its_batch(thinking: Llama) -> None:
    benchmark = BENCHMARKS["quality_ja"]
    rows = [
        {"ID": n, "prompt": [text], "text": [text]} for n, text in enumerate(("1 + 1 は？", "日本の首都はどこですか。"))
    ]
    together = answer(thinking, rows, benchmark, QUICK)
    assert together == [answer(thinking, [row], benchmark, QUICK)[0] for row in rows]


def test_an_answer_that_never_comes_is_null_and_said_so(thinking: Llama) -> None:
    rows = [{"ID": 1, "prompt": ["2 + 3 はいくつですか。"], "text": [""]}]
    (row,) = answer(thinking, rows, BENCHMARKS["quality_ja"], Asking(max_tokens=4, date="2026-01-01"))
    assert row["response"] == [None]
    assert row["error_messages"] == [["No answer in the final channel within 4 tokens."]]


def test_interventions_act(thinking: Llama) -> None:
    rows = [{"ID": 1, "prompt": ["日本の首都はどこですか。"], "text": [""]}]
    gone = Changes((KnockOut(experts=tuple(range(28)), mode="reroute"),))
    plain, changed = (answer(thinking, rows, BENCHMARKS["quality_ja"], QUICK, change) for change in (None, gone))
    assert plain != changed


def test_the_command_keeps_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = source(tmp_path, "quality_ja"), tmp_path / "out"
    command = ["judge-export", "nano-dense-thinking", "--benchmark", f"quality_ja={file}", "--out", str(out)]
    command += ["--max-tokens", "8", "--limit", "1", "--date", "2026-01-01", "--name", "my-model"]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines() == [str(out / "quality_ja.jsonl"), str(out / "metadata.json")]
    assert json.loads((out / "metadata.json").read_text("utf-8")) == {"model_name": "my-model"}
    (out / "quality_ja.jsonl").write_text("kept\n")
    assert main(command) == 0
    assert (out / "quality_ja.jsonl").read_text() == "kept\n"
    assert main([*command, "--overwrite"]) == 0
    assert json.loads((out / "quality_ja.jsonl").read_text("utf-8"))["ID"] == "q-1"


def test_answers_that_came_from_something_else_are_not_kept(
    thinking: Llama, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quality, safety, out = source(tmp_path, "quality_ja"), source(tmp_path, "safety_ja"), tmp_path / "out"
    asking = QUICKEST
    export(thinking, {"quality_ja": quality}, out, asking, limit=1)
    before = (out / "quality_ja.jsonl").read_bytes()
    gone = (KnockOut(experts=(3,), mode="drop"),)
    for change, differs in (
        ({"name": "other"}, "name"),
        ({"interventions": gone}, "changes"),
        ({"asking": Asking(effort="high", date="2026-01-01", max_tokens=4)}, "asked.effort"),
        ({"limit": 2}, "limit"),
    ):
        options = {"asking": asking, "limit": 1, **change}
        with pytest.raises(RunError, match=f"expected {differs}"):
            export(thinking, {"quality_ja": quality}, out, **options)
    with pytest.raises(RunError, match=r"expected quality_ja\.changes"):  # they would share one name
        export(thinking, {"safety_ja": safety}, out, asking, limit=1, interventions=gone)
    assert (out / "quality_ja.jsonl").read_bytes() == before
    export(thinking, {"quality_ja": quality, "safety_ja": safety}, out, asking, limit=1)
    assert (out / "quality_ja.jsonl").read_bytes() == before
    (out / "export.json").unlink()
    with pytest.raises(RunError, match=r"expected answers to quality_ja that export\.json tells of"):
        export(thinking, {"quality_ja": quality}, out, asking, limit=1)
    both = {"quality_ja": quality, "safety_ja": safety}
    export(thinking, both, out, asking, limit=1, interventions=gone, overwrite=True)


QUICKEST = Asking(effort="low", date="2026-01-01", max_tokens=4)
GONE = (KnockOut(experts=(3,), mode="drop"),)


def test_a_run_that_breaks_off_leaves_no_answer_under_a_wrong_name(
    thinking: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {name: source(tmp_path, name) for name in ("quality_ja", "safety_ja")}
    export(thinking, both, tmp_path / "out", QUICKEST, name="X", limit=1)
    whole = judge.answer

    def broken(model: Llama, rows: list, benchmark: object, *rest: object) -> list:
        if benchmark is BENCHMARKS["safety_ja"]:
            raise KeyboardInterrupt
        return whole(model, rows, benchmark, *rest)

    monkeypatch.setattr(judge, "answer", broken)
    options = {"name": "Y", "limit": 1, "interventions": GONE}
    with pytest.raises(KeyboardInterrupt):
        export(thinking, both, tmp_path / "out", QUICKEST, overwrite=True, **options)
    assert json.loads((tmp_path / "out" / "metadata.json").read_text("utf-8")) == {"model_name": "Y"}
    assert sorted(file.name for file in (tmp_path / "out").glob("*.jsonl")) == ["quality_ja.jsonl"]
    monkeypatch.setattr(judge, "answer", whole)
    done = (tmp_path / "out" / "quality_ja.jsonl").stat().st_mtime_ns
    export(thinking, both, tmp_path / "out", QUICKEST, **options)
    assert (tmp_path / "out" / "quality_ja.jsonl").stat().st_mtime_ns == done, "what was done is kept"


def test_too_long_items_are_refused_before_anything_is_replaced(thinking: Llama, tmp_path: Path) -> None:
    file = source(tmp_path, "quality_ja")
    export(thinking, {"quality_ja": file}, tmp_path / "out", QUICKEST, limit=1)
    before = (tmp_path / "out" / "quality_ja.jsonl").read_bytes()
    with pytest.raises(RunError, match="Lower --max-tokens"):
        export(thinking, {"quality_ja": file}, tmp_path / "out", Asking(max_tokens=510), overwrite=True)
    assert (tmp_path / "out" / "quality_ja.jsonl").read_bytes() == before


def test_answers_of_unknown_origin_or_under_another_block_get_no_company(thinking: Llama, tmp_path: Path) -> None:
    quality, safety = source(tmp_path, "quality_ja"), source(tmp_path, "safety_ja")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "quality_ja.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match="expected answers to quality_ja"):
        export(thinking, {"safety_ja": safety}, tmp_path / "out", QUICKEST, limit=1)
    export(thinking, {"quality_ja": quality}, tmp_path / "b", QUICKEST, limit=1)
    with thinking.intervene(GONE), pytest.raises(RunError, match=r"quality_ja\.attached"):
        export(thinking, {"safety_ja": safety}, tmp_path / "b", QUICKEST, limit=1)
    (tmp_path / "b" / "export.json").write_text("{")
    with pytest.raises(RunError, match="expected what an export wrote"):
        export(thinking, {"safety_ja": safety}, tmp_path / "b", QUICKEST, limit=1)
    with pytest.raises(RunError, match="limit: expected at least 1"):
        export(thinking, {"safety_ja": safety}, tmp_path / "c", QUICKEST, limit=0)


def test_the_same_command_continues_the_next_day_and_in_smaller_batches(
    thinking: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = source(tmp_path, "quality_ja")
    export(thinking, {"quality_ja": file}, tmp_path / "out", QUICKEST, limit=1)
    before = (tmp_path / "out" / "quality_ja.jsonl").read_bytes()
    later = Asking(effort="low", date=None, max_tokens=4, batch_size=1)
    export(thinking, {"quality_ja": file, "safety_ja": source(tmp_path, "safety_ja")}, tmp_path / "out", later, limit=1)
    assert (tmp_path / "out" / "quality_ja.jsonl").read_bytes() == before
    dates = {held["asked"]["date"] for held in json.loads((tmp_path / "out" / "export.json").read_text()).values()}
    assert dates == {"2026-01-01"}


def test_a_base_model_and_no_items_are_refused(base: Llama, thinking: Llama, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected one with a chat template"):
        export(base, {"quality_ja": source(tmp_path, "quality_ja")}, tmp_path / "out")
    (tmp_path / "empty").write_text("")
    with pytest.raises(RunError, match="expected items of mt_bench_ja, got none"):
        export(thinking, {"mt_bench_ja": tmp_path / "empty"}, tmp_path / "out")


@pytest.mark.parametrize(
    ("benchmark", "text", "message"),
    [
        ("quality_ja", "{}", "expected a JSON list"),
        ("quality_ja", "nothing", "expected JSON"),
        ("safety_ja", '[{"ID": 1, "text": "a"}]', "got one without output"),
        ("mt_bench_ja", '{"question_id": 1, "turns": ["a"]}', "got one without category"),
        ("safety_boundary_ja", "input,type\na,b\n", "got one without safety"),
        ("mt_bench_ja", '{"question_id": 1, "category": "math", "turns": [3]}', "expected turns of text"),
    ],
)
def test_other_files_are_refused(thinking: Llama, tmp_path: Path, benchmark: str, text: str, message: str) -> None:
    file = tmp_path / "source"
    file.write_text(text)
    with pytest.raises(RunError, match=message):
        export(thinking, {benchmark: file}, tmp_path / "out", QUICK)


def test_what_does_not_fit_is_refused(thinking: Llama, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected some of quality_ja"):
        export(thinking, {"other": tmp_path}, tmp_path, QUICK)
    with pytest.raises(RunError, match="Lower --max-tokens"):
        export(thinking, {"quality_ja": source(tmp_path, "quality_ja")}, tmp_path / "out", Asking(max_tokens=512))
