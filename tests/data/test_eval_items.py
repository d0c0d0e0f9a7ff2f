"""The committed items of `workbench eval` are what the generator of this tree writes, held-out side only."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from eval_items import BOS, TASKS, files, items
from generator.parallel import EFFORTS, LANGUAGES

ITEMS = items()


def test_the_committed_files_are_what_the_script_writes() -> None:
    found = files()
    committed = {path.name for path in TASKS.iterdir() if path.suffix in (".jsonl", ".yaml")}
    assert committed == set(found)
    for name, text in found.items():
        assert (TASKS / name).read_text(encoding="utf-8") == text, name


@pytest.mark.parametrize("name", list(ITEMS))
def test_every_item_has_its_fields_and_a_name_of_its_own(name: str) -> None:
    found = ITEMS[name]
    assert len({item["id"] for item in found}) == len(found)
    assert {item["lang"] for item in found} == set(LANGUAGES)
    for item in found:
        assert item["group"]
        assert item["kind"]


def test_choices_hold_the_right_one_once() -> None:
    for item in [*ITEMS["facts"], *ITEMS["sums"]]:
        assert len(set(item["choices"])) == 4
        assert item["prompt"].startswith(BOS)
        assert not item["prompt"].endswith(" ")
    golds = Counter(item["gold"] for item in [*ITEMS["facts"], *ITEMS["sums"]])
    assert min(golds.values()) > 0.5 * max(golds.values())


def test_right_sums_are_right() -> None:
    for item in ITEMS["sums"]:
        expression = item["id"].split("/")[0]
        a, sign, b = expression.replace("+", " + ").replace("-", " - ").split()
        value = int(a) + int(b) if sign == "+" else int(a) - int(b)
        digits = "".join(character for character in item["choices"][item["gold"]] if character.isdigit())
        assert int(digits) == value
        low, high = sorted((int(a), int(b)) if sign == "+" else (int(b), int(a) - int(b)))
        assert item["group"] == f"family:{low}+{high}"


def test_both_languages_are_asked_the_same_sums() -> None:
    for name in ("sums", "worked"):
        by_lang = [[item["group"] for item in ITEMS[name] if item["lang"] == lang] for lang in LANGUAGES]
        assert by_lang[0] == by_lang[1]
    cells = Counter((item["lang"], item["effort"], item["kind"]) for item in ITEMS["answers"])
    assert set(cells.values()) == {24}
    assert len(cells) == len(LANGUAGES) * len(EFFORTS) * 2


def test_what_a_task_file_names_is_there() -> None:
    for name, text in files().items():
        if name.endswith(".yaml"):
            include = text.splitlines()[0].removeprefix("include: ")
            assert (TASKS / include).is_file()
            assert f"task: {name.removesuffix('.yaml')}\n" in text
    assert json.loads((TASKS / "facts.jsonl").read_text("utf-8").splitlines()[0])["gold"] in range(4)
