from __future__ import annotations

import csv
import itertools
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.errors import PromptError
from workbench.io import prompts as prompts_module
from workbench.io.prompts import (
    BUNDLED_PROMPTS,
    GENRES,
    LANGS,
    SCRIPTS,
    SPLITS,
    Prompt,
    load_prompts,
    parallel_pairs,
    prompts_frame,
    select,
    split_of,
)

FIELDS = "doc_id, group_id, lang, topic, kind, text, split, answer, script, source, license, genre, expression"
JA = {"group_id": "g1", "lang": "ja", "topic": "food", "text": "りんごは何個ですか。"}
EN = {"group_id": "g1", "lang": "en", "topic": "food", "text": "How many apples are there?"}


def write_jsonl(file: Path, *rows: object) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def write_csv(file: Path, prompts: list[Prompt]) -> Path:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=FIELDS.split(", "), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(asdict(prompt) for prompt in prompts)
    return file


def save(prompts: list[Prompt], file: Path) -> Path:
    if file.suffix == ".jsonl":
        return write_jsonl(file, *map(asdict, prompts))
    if file.suffix == ".csv":
        return write_csv(file, prompts)
    prompts_frame(prompts).write_parquet(file)
    return file


def refusal(path: Path) -> str:
    """The message with which `path` is refused, its own path shown as FILE."""
    with pytest.raises(PromptError) as caught:
        load_prompts(path)
    return str(caught.value).replace(str(path), "FILE")


class TestGoodFiles:
    def test_defaults_are_filled_in(self, tmp_path):
        file = write_jsonl(tmp_path / "mine.jsonl", JA, EN | {"answer": "three"}, JA | {"script": "romaji"})
        assert load_prompts(file) == [
            Prompt("g1-ja", "g1", "ja", "food", "parallel", JA["text"], split_of("g1"), source="mine.jsonl"),
            Prompt("g1-en", "g1", "en", "food", "parallel", EN["text"], split_of("g1"), "three", source="mine.jsonl"),
            Prompt(
                "g1-ja-romaji", "g1", "ja", "food", "parallel", JA["text"], split_of("g1"), None, "romaji", "mine.jsonl"
            ),
        ]

    def test_null_means_absent(self, tmp_path):
        file = write_jsonl(tmp_path / "a.jsonl", JA | {"answer": None, "split": None})
        assert load_prompts(file) == load_prompts(write_jsonl(tmp_path / "a.jsonl", JA))

    def test_own_split_is_kept(self, tmp_path):
        other = next(split for split in SPLITS if split != split_of("g1"))
        file = write_jsonl(tmp_path / "a.jsonl", JA | {"split": other}, EN | {"split": other})
        assert {prompt.split for prompt in load_prompts(file)} == {other}

    def test_blank_lines_byte_order_mark_and_windows_line_ends(self, tmp_path):
        file = tmp_path / "a.jsonl"
        file.write_bytes(b"\xef\xbb\xbf" + json.dumps(JA).encode() + b"\r\n\r\n" + json.dumps(EN).encode() + b"\r\n\n")
        assert [prompt.lang for prompt in load_prompts(file)] == ["ja", "en"]

    def test_csv_as_a_spreadsheet_writes_it(self, tmp_path):
        file = tmp_path / "a.csv"
        lines = (
            "\ufefftext,lang,topic,group_id,answer",
            '"一行目、\n二行目",ja,food,g1,',
            "",
            '"Say ""yes"".",en,food,g1,yes',
            "",
        )
        file.write_bytes("\r\n".join(lines).encode())
        ja, en = load_prompts(file)
        assert (ja.text, ja.answer, en.text, en.answer) == ("一行目、\n二行目", None, 'Say "yes".', "yes")

    def test_directory_is_read_in_order_of_name(self, tmp_path):
        write_jsonl(tmp_path / "b.jsonl", JA)
        save(load_prompts(write_jsonl(tmp_path / "a.jsonl", EN | {"group_id": "g0"})), tmp_path / "c.PARQUET")
        (tmp_path / "a.jsonl").unlink()
        (tmp_path / "README.md").write_text("not a prompt file")
        assert [prompt.doc_id for prompt in load_prompts(tmp_path)] == ["g1-ja", "g0-en"]

    def test_group_may_span_files(self, tmp_path):
        write_jsonl(tmp_path / "ja.jsonl", JA)
        write_jsonl(tmp_path / "en.jsonl", EN)
        assert len(parallel_pairs(load_prompts(tmp_path))) == 1


BAD_ROWS = [
    (EN | {"txt": "x"}, f": expected a field among {FIELDS}, got 'txt'. Rename it or take it out."),
    (
        {k: v for k, v in EN.items() if k != "text"},
        ", field 'text': expected a value, got nothing. Every row needs one.",
    ),
    (EN | {"group_id": None}, ", field 'group_id': expected a value, got nothing. Every row needs one."),
    (
        {k: v for k, v in EN.items() if k != "topic"},
        ", field 'topic': expected a value, got nothing. Every row needs one.",
    ),
    (EN | {"answer": 12}, ", field 'answer': expected text, got int 12. Write it as a string."),
    (EN | {"topic": ["food"]}, ", field 'topic': expected text, got list ['food']. Write it as a string."),
    (EN | {"text": {"en": "x"}}, ", field 'text': expected text, got dict {'en': 'x'}. Write it as a string."),
    (EN | {"lang": True}, ", field 'lang': expected text, got bool True. Write it as a string."),
    (
        EN | {"lang": "fr"},
        ", field 'lang': expected a value among ja, en, mixed, got 'fr'. Check the spelling.",
    ),
    (
        EN | {"script": "kanji"},
        ", field 'script': expected a value among std, romaji, kana, latin, got 'kanji'. Check the spelling.",
    ),
    (
        EN | {"kind": "Parallel"},
        ", field 'kind': expected a value among parallel, reasoning, script, got 'Parallel'. Check the spelling.",
    ),
    (
        EN | {"genre": "poem"},
        ", field 'genre': expected a value among question, instruction, got 'poem'. Check the spelling.",
    ),
    (
        EN | {"split": "test"},
        ", field 'split': expected a value among discovery, validation, got 'test'. Check the spelling.",
    ),
    (EN | {"text": ""}, ", field 'text': expected text, got a blank ''. Write the text, or leave the field out."),
    (
        EN | {"text": "\u3000\n"},
        ", field 'text': expected text, got a blank '\\u3000\\n'. Write the text, or leave the field out.",
    ),
    (EN | {"group_id": "g1 "}, ", field 'group_id': expected no space at the ends, got 'g1 '. Take it out."),
    (
        EN | {"doc_id": "g1-ja"},
        ", field 'doc_id': expected a doc_id of its own, got 'g1-ja', which is also at FILE, line 1. "
        "Change one of them.",
    ),
    (
        JA | {"doc_id": "second", "text": "別の文です。"},
        ", field 'group_id': expected one row in ja and script std per group, got a second one in group 'g1' "
        "(the first is at FILE, line 1). Change its group_id.",
    ),
    (
        EN | {"topic": "science"},
        ", field 'topic': expected 'food' as in the rest of group 'g1' (FILE, line 1), got 'science'. Make them agree.",
    ),
    (
        EN | {"split": next(split for split in SPLITS if split != split_of("g1"))},
        f", field 'split': expected '{split_of('g1')}' as in the rest of group 'g1' (FILE, line 1), got "
        f"'{next(split for split in SPLITS if split != split_of('g1'))}'. Make them agree.",
    ),
]


class TestBadRows:
    @pytest.mark.parametrize(("row", "message"), BAD_ROWS)
    def test_jsonl_row_is_named(self, tmp_path, row, message):
        assert refusal(write_jsonl(tmp_path / "a.jsonl", JA, row)) == f"FILE, line 2{message}"

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (
                b'{"group_id": "g1",',
                "line 2: expected a JSON object, got invalid JSON (Expecting property name enclosed in double quotes: "
                "line 1 column 19 (char 18)). Mend the line.",
            ),
            (b'["g1", "en"]', "line 2: expected a JSON object, got list ['g1', 'en']. Write one object per line."),
            (b'"text"', "line 2: expected a JSON object, got 'text'. Write one object per line."),
            (b'{"text": "a", "text": "b"}', "line 2, field 'text': expected it once, got it twice. Keep one."),
            (b'{"text": "\xff"}', "line 2: expected UTF-8, got the byte 0xff. Save the file as UTF-8."),
            (
                "東京".encode("shift_jis"),
                "line 2: expected UTF-8, got the byte 0x93. Save the file as UTF-8.",
            ),
            (
                b'{"text": "\\ud83d"}',
                "line 2, field 'text': expected Unicode text, got half a surrogate pair in '\\ud83d'. Mend it.",
            ),
        ],
    )
    def test_broken_line_is_named(self, tmp_path, line, message):
        file = tmp_path / "a.jsonl"
        file.write_bytes(json.dumps(JA).encode() + b"\n" + line + b"\n")
        assert refusal(file) == f"FILE, {message}"

    def test_invalid_utf8_after_a_byte_order_mark(self, tmp_path):
        file = tmp_path / "a.csv"
        file.write_bytes(b"\xef\xbb\xbftext\na\n\x80\n")
        assert refusal(file) == "FILE, line 3: expected UTF-8, got the byte 0x80. Save the file as UTF-8."

    @pytest.mark.parametrize("line", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
    def test_hostile_json_is_one_error(self, tmp_path, line):
        file = tmp_path / "a.jsonl"
        file.write_text(line)
        assert refusal(file).startswith("FILE, line 1: expected a JSON object, got invalid JSON (")

    def test_long_values_are_cut(self, tmp_path):
        message = refusal(write_jsonl(tmp_path / "a.jsonl", JA | {"lang": "x" * 1000}))
        assert message == (
            f"FILE, line 1, field 'lang': expected a value among ja, en, mixed, got '{'x' * 56}.... Check the spelling."
        )

    def test_duplicates_are_found_across_files(self, tmp_path):
        write_jsonl(tmp_path / "a.jsonl", JA)
        write_jsonl(tmp_path / "b.jsonl", EN | {"group_id": "g2", "doc_id": "g1-ja"})
        assert refusal(tmp_path) == (
            "FILE/b.jsonl, line 1, field 'doc_id': expected a doc_id of its own, got 'g1-ja', which is also at "
            "FILE/a.jsonl, line 1. Change one of them."
        )

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                "g1,ja,food,a\ng1,en,food,b,c\n",
                ", row 2: expected 4 cells as in the header, got 5. Quote a text that holds commas or line breaks.",
            ),
            (
                "g1,ja,food\n",
                ", row 1: expected 4 cells as in the header, got 3. Quote a text that holds commas or line breaks.",
            ),
            (
                "g1,ja,food,a\ng1,,food,b\n",
                ", row 2, field 'lang': expected a value, got nothing. Every row needs one.",
            ),
            (
                "g1,jp,food,a\n",
                ", row 1, field 'lang': expected a value among ja, en, mixed, got 'jp'. Check the spelling.",
            ),
            (
                'g1,ja,food,a\ng1,en,food,"b\n',
                ", after row 1: expected valid CSV, got an error (unexpected end of data). Check the quotes there.",
            ),
            (
                f"g1,ja,food,a\ng1,en,food,{'b' * 131_073}\n",
                ", after row 1: expected valid CSV, got an error (field larger than field limit (131072)). "
                "Write texts of more than 131,072 characters as .jsonl, or close the quote left open there.",
            ),
            ("", ": expected at least one prompt, got none. Add rows, or pass another file."),
        ],
    )
    def test_csv_row_is_named(self, tmp_path, content, message):
        file = tmp_path / "a.csv"
        file.write_text(f"group_id,lang,topic,text\n{content}", encoding="utf-8")
        assert refusal(file) == f"FILE{message}"

    def test_csv_header_names_a_field_twice(self, tmp_path):
        (tmp_path / "a.csv").write_text("text,lang,text\na,ja,b\n")
        assert refusal(tmp_path / "a.csv") == "FILE, header, field 'text': expected it once, got it twice. Keep one."

    @pytest.mark.parametrize(
        ("column", "message"),
        [
            (
                pl.Series("answer", [1, 2]),
                ", row 1, field 'answer': expected text, got int 1. Write it as a string.",
            ),
            (
                pl.Series("text", ["a", None]),
                ", row 2, field 'text': expected a value, got nothing. Every row needs one.",
            ),
            (
                pl.Series("prompt", ["a", "b"]),
                f", row 1: expected a field among {FIELDS}, got 'prompt'. Rename it or take it out.",
            ),
        ],
    )
    def test_parquet_row_is_named(self, tmp_path, column, message):
        pl.DataFrame([JA, EN]).with_columns(column).write_parquet(tmp_path / "a.parquet")
        assert refusal(tmp_path / "a.parquet") == f"FILE{message}"

    def test_not_a_parquet_file(self, tmp_path):
        (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing of the kind PAR1")
        assert refusal(tmp_path / "a.parquet").startswith("FILE: expected a Parquet file, got an error (")


class TestPaths:
    def test_missing(self, tmp_path):
        assert refusal(tmp_path / "a.jsonl") == (
            "FILE: expected prompts in .jsonl, .csv or .parquet files, got no such file or directory. Check the path."
        )

    def test_directory_without_prompts(self, tmp_path):
        (tmp_path / "notes.txt").write_text("none here")
        assert refusal(tmp_path) == (
            "FILE: expected prompts in .jsonl, .csv or .parquet files, got none in that directory. Check the path."
        )

    def test_other_file_type(self, tmp_path):
        (tmp_path / "a.json").write_text("[]")
        assert refusal(tmp_path / "a.json") == (
            "FILE: expected a file type among .jsonl, .csv, .parquet, got '.json'. Convert the file, or rename it."
        )

    @pytest.mark.parametrize("content", ["", "\n\n"])
    def test_empty_file(self, tmp_path, content):
        (tmp_path / "a.jsonl").write_text(content)
        assert refusal(tmp_path / "a.jsonl") == (
            "FILE: expected at least one prompt, got none. Add rows, or pass another file."
        )

    def test_installed_without_data(self, tmp_path, monkeypatch):
        monkeypatch.setattr(prompts_module, "BUNDLED_PROMPTS", tmp_path / "gone")
        assert refusal(tmp_path / "gone") == (
            "bundled prompts: expected prompt files in FILE, got none. They come with a clone of the repository, not "
            "with an installed package: work in a clone, or pass a prompt file of your own."
        )


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip)
names = words.map(str.strip)


@st.composite
def prompt_lists(draw: st.DrawFn) -> list[Prompt]:
    """Prompts with arbitrary text in every free field, in groups that hold together."""
    prompts: list[Prompt] = []
    for group_id in draw(st.lists(names, min_size=1, max_size=3, unique=True)):
        topic, split = draw(names), draw(st.sampled_from(SPLITS))
        for lang, script in draw(st.sets(st.tuples(st.sampled_from(LANGS), st.sampled_from(SCRIPTS)), min_size=1)):
            prompt = Prompt(f"{len(prompts)}", group_id, lang, topic, "parallel", draw(words), split, script=script)
            answer, genre = draw(st.none() | words), draw(st.none() | st.sampled_from(GENRES))
            expression, source = draw(st.none() | names), draw(names)
            prompts.append(replace(prompt, answer=answer, genre=genre, expression=expression, source=source))
    return prompts


class TestRoundTrip:
    @pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(prompts=prompt_lists())
    def test_any_text_survives(self, tmp_path, suffix, prompts):
        assert load_prompts(save(prompts, tmp_path / f"a{suffix}")) == prompts

    @pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
    def test_bundled_prompts(self, tmp_path, suffix):
        prompts = load_prompts()
        assert load_prompts(save(prompts, tmp_path / f"a{suffix}")) == prompts

    def test_frame_writes_csv_and_jsonl_that_load(self, tmp_path):
        prompts = load_prompts()
        prompts_frame(prompts).write_csv(tmp_path / "a.csv")
        prompts_frame(prompts).write_ndjson(tmp_path / "a.jsonl")
        assert load_prompts(tmp_path / "a.csv") == load_prompts(tmp_path / "a.jsonl") == prompts

    @settings(max_examples=40, deadline=None)
    @given(prompts=prompt_lists())
    def test_frame_holds_every_field(self, prompts):
        frame = prompts_frame(prompts)
        assert ", ".join(frame.columns) == FIELDS
        assert [Prompt(**row) for row in frame.iter_rows(named=True)] == prompts

    def test_empty_frame_has_the_columns(self):
        assert prompts_frame([]).schema == prompts_frame(load_prompts()).schema


class TestSelect:
    def test_by_value_and_by_values(self):
        prompts = load_prompts()
        chosen = select(prompts, lang="ja", topic=("food", "science"), kind="parallel")
        assert chosen == [
            p for p in prompts if p.lang == "ja" and p.topic in ("food", "science") and p.kind == "parallel"
        ]
        assert len(chosen) == 52

    def test_unknown_field(self):
        with pytest.raises(PromptError) as caught:
            select(load_prompts(), language="ja")
        assert str(caught.value) == f"select: expected a field among {FIELDS}, got 'language'. Check the spelling."

    def test_value_that_no_prompt_has(self, tmp_path):
        with pytest.raises(PromptError) as caught:
            select(load_prompts(write_jsonl(tmp_path / "a.jsonl", JA, EN)), lang=["ja", "jp"])
        assert (
            str(caught.value)
            == "select: expected a lang that some prompt has among en, ja, got 'jp'. Check the spelling."
        )


class TestParallelPairs:
    def test_order_is_japanese_then_english(self, tmp_path):
        ((ja, en),) = parallel_pairs(load_prompts(write_jsonl(tmp_path / "a.jsonl", EN, JA)))
        assert (ja.lang, en.lang) == ("ja", "en")

    def test_other_scripts_take_no_part(self):
        script = select(load_prompts(), kind="script")
        assert parallel_pairs(script) == parallel_pairs(select(script, script="std"))

    def test_groups_without_partner_are_named(self, tmp_path):
        rows = [JA | {"group_id": f"g{i}"} for i in range(6)] + [EN | {"group_id": "g9"}]
        with pytest.raises(PromptError) as caught:
            parallel_pairs(load_prompts(write_jsonl(tmp_path / "a.jsonl", *rows)))
        assert str(caught.value) == (
            "parallel pairs: expected a ja and an en row in every group, got groups without a partner: 'g0' (only ja), "
            "'g1' (only ja), 'g2' (only ja), 'g3' (only ja), 'g4' (only ja) and 2 more. Add the missing rows, or leave "
            "these groups out."
        )

    def test_two_rows_of_one_language(self, tmp_path):
        (prompt,) = load_prompts(write_jsonl(tmp_path / "a.jsonl", JA))
        with pytest.raises(PromptError) as caught:
            parallel_pairs([prompt, replace(prompt, doc_id="again")])
        assert str(caught.value) == (
            "parallel pairs: expected one ja row in group 'g1', got 'g1-ja' and 'again'. "
            "Give one of them another group_id."
        )


class TestSplit:
    def test_known_values(self):
        # The 8th byte of what sha256sum prints decides: e3b0c44298fc1c14, 711430f6164e9380, 23ba21e7ed4e9757.
        assert [split_of(name) for name in ("", "g1", "食べ物")] == ["discovery", "discovery", "validation"]

    def test_halves_are_even(self):
        counts = Counter(split_of(f"group-{i}") for i in range(10_000))
        assert abs(counts["discovery"] - 5000) < 250


# --- The bundled set keeps its promises -------------------------------------------------------------------------------

WEEKDAYS = {
    "Monday": "月曜日",
    "Tuesday": "火曜日",
    "Wednesday": "水曜日",
    "Thursday": "木曜日",
    "Friday": "金曜日",
    "Saturday": "土曜日",
    "Sunday": "日曜日",
}
MONTHS = (
    "January February March April May June July August September October November December".split()  # noqa: SIM905
)
IN_JAPANESE = (
    WEEKDAYS
    | {month: f"{i}月" for i, month in enumerate(MONTHS, start=1)}
    | {"Ken": "健", "Yumi": "由美", "Aoi": "葵", "Daisuke": "大輔"}
)


def rank(place: int, *statements: str) -> str:
    """The name at `place` in the one order of names that fits all statements "A > B"."""
    pairs = [statement.split(" > ") for statement in statements]
    people = sorted({name for pair in pairs for name in pair})
    fitting = [
        order for order in itertools.permutations(people) if all(order.index(a) < order.index(b) for a, b in pairs)
    ]
    (only,) = {order[place - 1] for order in fitting}
    return only


def step(*numbers: int) -> int:
    (difference,) = {b - a for a, b in itertools.pairwise(numbers)}
    return numbers[-1] + difference


def double(*numbers: int) -> int:
    assert all(b == 2 * a for a, b in itertools.pairwise(numbers))
    return 2 * numbers[-1]


CALLS: dict[str, Callable[..., object]] = {
    "max": max,
    "min": min,
    "sorted": sorted,
    "weekday": lambda n: list(WEEKDAYS)[n % 7],
    "month": lambda n: MONTHS[(n - 1) % 12],
    "largest": lambda **people: max(people, key=people.__getitem__),
    "smallest": lambda **people: min(people, key=people.__getitem__),
    "rank": rank,
    "step": step,
    "double": double,
}
HIRAGANA, KATAKANA, KANJI = "[\u3041-\u309f]", "[\u30a1-\u30ff]", "[\u3400-\u9fff々]"
JAPANESE = f"{HIRAGANA}|{KATAKANA}|{KANJI}|[\u3000-\u303f\uff00-\uffef]"


@pytest.fixture(scope="module")
def bundled() -> list[Prompt]:
    return load_prompts()


class TestBundled:
    def test_default_path_is_in_the_clone(self):
        assert Path(prompts_module.__file__).parents[2] / "data" / "prompts" == BUNDLED_PROMPTS
        assert sorted(file.name for file in BUNDLED_PROMPTS.iterdir()) == [
            "README.md",
            "parallel.jsonl",
            "reasoning.jsonl",
            "scripts.jsonl",
        ]

    @pytest.mark.parametrize(
        ("file", "groups", "per_group"), [("parallel", 260, 2), ("reasoning", 52, 2), ("scripts", 28, 5)]
    )
    def test_counts_are_those_of_the_readme(self, file, groups, per_group):
        prompts = load_prompts(BUNDLED_PROMPTS / f"{file}.jsonl")
        assert set(Counter(prompt.group_id for prompt in prompts).values()) == {per_group}
        assert len(prompts) == groups * per_group
        assert f"| `{file}.jsonl` | {groups} | {len(prompts)} |" in (BUNDLED_PROMPTS / "README.md").read_text("utf-8")

    def test_file_is_sorted_and_states_every_field(self):
        for file in BUNDLED_PROMPTS.glob("*.jsonl"):
            rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
            ids = [row["group_id"] for row in rows]
            assert ids == sorted(ids)
            for row in rows:
                assert set(row) | {"answer", "expression"} == set(FIELDS.split(", "))
                assert row["license"] == "Apache-2.0"

    def test_topics_are_balanced(self, bundled):
        pairs = parallel_pairs(select(bundled, kind="parallel"))
        topics = Counter(ja.topic for ja, _ in pairs)
        assert len(topics) == 10
        assert set(topics.values()) == {26}
        for topic in topics:
            assert {ja.genre for ja, _ in pairs if ja.topic == topic} == set(GENRES)

    def test_rows_of_a_pair_agree(self, bundled):
        for ja, en in parallel_pairs(bundled):
            assert (ja.genre, ja.expression, ja.answer is None) == (en.genre, en.expression, en.answer is None)

    def test_about_a_third_have_answers(self, bundled):
        answered = [ja.answer is not None for ja, _ in parallel_pairs(select(bundled, kind="parallel"))]
        assert 0.3 < statistics.mean(answered) < 0.4
        assert all(prompt.answer for prompt in select(bundled, kind="reasoning"))

    def test_split_is_that_of_the_hash(self, bundled):
        assert all(prompt.split == split_of(prompt.group_id) for prompt in bundled)

    def test_no_text_twice(self, bundled):
        def squeezed(prompt: Prompt) -> str:
            return re.sub(r"\W", "", prompt.text.lower())

        assert max(Counter(map(squeezed, bundled)).values()) == 1

    def test_texts_are_not_one_template(self, bundled):
        for kind, lang, start in (("parallel", "ja", 8), ("parallel", "en", 12)):
            starts = Counter(p.text[:start] for p in select(bundled, kind=kind, lang=lang))
            assert starts.most_common(1)[0][1] <= 10

    def test_languages_keep_to_their_script(self, bundled):
        for ja, en in parallel_pairs(bundled):
            assert re.search(HIRAGANA, ja.text)
            assert re.search(JAPANESE, (ja.answer or "あ") + ja.text)
            assert not re.search(r"[A-Za-z]", ja.text)
            assert not re.search(JAPANESE, en.text + (en.answer or ""))

    def test_script_rows_keep_to_their_script(self, bundled):
        for prompt in select(bundled, kind="script", script=("romaji", "kana", "latin")):
            has = {
                name: bool(re.search(s, prompt.text))
                for name, s in (("A", "[A-Za-z]"), ("ひ", HIRAGANA), ("カ", KATAKANA))
            }
            if prompt.script == "romaji":
                assert prompt.text.isascii()
                assert prompt.lang == "ja"
            elif prompt.script == "kana":
                assert has == {"A": False, "ひ": False, "カ": True}
                assert prompt.lang == "en"
            else:
                assert has["A"]
                assert has["ひ"]
                assert prompt.lang == "mixed"

    def test_script_groups_have_all_five(self, bundled):
        rows = [(prompt.lang, prompt.script) for prompt in select(bundled, kind="script")]
        want = [("ja", "std"), ("ja", "romaji"), ("en", "std"), ("en", "kana"), ("mixed", "latin")]
        assert Counter(rows) == dict.fromkeys(want, 28)

    def test_lengths_are_in_proportion(self, bundled):
        ratios = [len(en.text) / len(ja.text) for ja, en in parallel_pairs(bundled)]
        assert 1.2 < min(ratios) <= max(ratios) < 4
        assert 2 < statistics.median(ratios) < 2.8

    def test_lengths_vary(self, bundled):
        sentences = [
            len(re.findall(r"[。?\uff1f]", ja.text)) for ja, _ in parallel_pairs(select(bundled, kind="parallel"))
        ]
        assert Counter(min(4, n) for n in sentences).keys() == {1, 2, 3, 4}
        assert sum(n >= 2 for n in sentences) >= 80

    def test_digits_agree_between_the_languages(self, bundled):
        """Where the Japanese row writes numbers in digits, the English row writes no others."""
        for ja, en in parallel_pairs(bundled):
            left, right = (set(re.findall(r"\d+", prompt.text)) for prompt in (ja, en))
            assert not left or right <= left, ja.group_id

    def test_expressions_give_the_answers(self, bundled):
        pairs = [(ja, en) for ja, en in parallel_pairs(bundled) if ja.expression]
        assert Counter(ja.kind for ja, _ in pairs) == {"parallel": 39, "reasoning": 43}  # 43 as the README says
        for ja, en in pairs:
            value = str(eval(ja.expression, {"__builtins__": {}}, CALLS))
            assert en.answer == value, ja.group_id
            assert ja.answer == IN_JAPANESE.get(value, value), ja.group_id

    def test_numbers_of_an_expression_are_in_the_text(self, bundled):
        """Guards against an expression that is right for another question."""
        for prompt in select(bundled, topic="word_problems"):
            expected, shown = (set(re.findall(r"\d+", text)) for text in (prompt.expression, prompt.text))
            assert expected <= shown | {"2"}, prompt.doc_id  # "half", "twice"
