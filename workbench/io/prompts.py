"""Prompts: one row is one prompt, and the rows of one group say the same thing in different languages or scripts.

`load_prompts` reads JSONL, CSV and Parquet files of one schema (data/prompts/README.md) and refuses what does not fit,
naming file, line and field: a wrong label in a prompt file becomes a wrong number in a study, silently.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from workbench.axes import LANGUAGES, SPLITS
from workbench.errors import PromptError

# A folder of JSONL files next to the package in a clone; an installed package does not carry it.
BUNDLED_PROMPTS = Path(__file__).resolve().parents[2] / "data" / "prompts"

LANGS = (*LANGUAGES, "mixed")
KINDS = ("parallel", "reasoning", "script")
SCRIPTS = ("std", "romaji", "kana", "latin")
GENRES = ("question", "instruction")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: a single user message with its labels.  All fields are text; None means "not given"."""

    doc_id: str  # unique
    group_id: str  # shared by all rows that say the same thing
    lang: str  # one of LANGS; "mixed" is English words inside Japanese
    topic: str
    kind: str  # one of KINDS
    text: str  # the user's message
    split: str  # one of SPLITS, the same for a whole group
    answer: str | None = None  # the expected final answer, in the row's language
    script: str = "std"  # one of SCRIPTS
    source: str = "unspecified"
    license: str = "unspecified"
    genre: str | None = None  # one of GENRES
    expression: str | None = None  # computes the answer, see data/prompts/README.md


Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]  # where a row stands, and what it holds
_FIELDS = tuple(field.name for field in fields(Prompt))
_REQUIRED = ("group_id", "lang", "topic", "text")
_CHOICES = {"lang": LANGS, "kind": KINDS, "script": SCRIPTS, "genre": GENRES, "split": SPLITS}
_SAME_IN_GROUP = ("split", "topic", "kind")


def load_prompts(path: str | Path = BUNDLED_PROMPTS) -> list[Prompt]:
    """Read prompts from a .jsonl, .csv or .parquet file, or from every such file of a directory in order of name.

    Absent (or null, or an empty CSV cell) fields take defaults: doc_id "<group_id>-<lang>" (with "-<script>" when that
    is not "std"), kind "parallel", script "std", split `split_of(group_id)`, source the file's name, license
    "unspecified".  Row numbers in errors start at 1 below a CSV's header and pass over blank lines.

    Raises PromptError naming file, line or row, and field for anything that does not fit the schema.
    """
    rows = ((file, where, row) for file in _files(Path(path)) for where, row in _READERS[file.suffix.lower()](file))
    placed = [(where, _prompt(row, where, file.name)) for file, where, row in rows]
    if not placed:
        raise PromptError(f"{path}: expected at least one prompt, got none. Add rows, or pass another file.")
    _check_groups(placed)
    _check_doc_ids(placed)
    return [prompt for _, prompt in placed]


def split_of(group_id: str) -> str:
    """The split of a group: the parity of the first 8 bytes of sha256(group_id in UTF-8).  Even is "discovery".

    It depends on nothing else, so adding or removing groups never moves another group from one split to the other.
    """
    number = int.from_bytes(hashlib.sha256(group_id.encode()).digest()[:8], "big")
    return SPLITS[number % 2]


def prompts_frame(prompts: Iterable[Prompt]) -> pl.DataFrame:
    """One row per prompt, one text column per field of Prompt, in the given order; None becomes null."""
    return pl.DataFrame([astuple(prompt) for prompt in prompts], schema=dict.fromkeys(_FIELDS, pl.String), orient="row")


def select(prompts: Iterable[Prompt], **wanted: str | Collection[str]) -> list[Prompt]:
    """The prompts whose fields have the wanted values: `select(prompts, lang="ja", topic=("food", "science"))`.

    Raises PromptError for a field that is none, and for a value that no prompt has (most often a misspelling).
    """
    prompts = list(prompts)
    choices = {field: (value,) if isinstance(value, str) else tuple(value) for field, value in wanted.items()}
    for field, values in choices.items():
        _one_of("select", "a field", field, _FIELDS)
        present = sorted({getattr(prompt, field) for prompt in prompts} - {None})
        for value in values:
            _one_of("select", f"a {field} that some prompt has", value, present)
    return [p for p in prompts if all(getattr(p, field) in values for field, values in choices.items())]


def parallel_pairs(prompts: Iterable[Prompt]) -> list[tuple[Prompt, Prompt]]:
    """(Japanese, English) prompts of each group in standard script, groups in order of first appearance.

    Rows in other scripts or of mixed language take no part.  Raises PromptError naming groups without a partner.
    """
    groups: dict[str, dict[str, Prompt]] = {}
    for prompt in prompts:
        if prompt.script == "std" and prompt.lang in LANGUAGES:
            rows = groups.setdefault(prompt.group_id, {})
            if prompt.lang in rows:
                raise PromptError(
                    f"parallel pairs: expected one {prompt.lang} row in group {prompt.group_id!r}, got "
                    f"{rows[prompt.lang].doc_id!r} and {prompt.doc_id!r}. Give one of them another group_id."
                )
            rows[prompt.lang] = prompt
    alone = [f"{group_id!r} (only {next(iter(rows))})" for group_id, rows in groups.items() if len(rows) == 1]
    if alone:
        shown = ", ".join(alone[:5]) + (f" and {len(alone) - 5} more" if len(alone) > 5 else "")
        raise PromptError(
            f"parallel pairs: expected a ja and an en row in every group, got groups without a partner: {shown}. "
            "Add the missing rows, or leave these groups out."
        )
    return [(rows["ja"], rows["en"]) for rows in groups.values()]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _READERS and file.is_file())
        if files:
            return files
    elif path.exists():
        _one_of(str(path), "a file type", path.suffix.lower(), tuple(_READERS), "Convert the file, or rename it.")
        return [path]
    if path == BUNDLED_PROMPTS:
        raise PromptError(
            f"bundled prompts: expected prompt files in {path}, got none. They come with a clone of the repository, "
            "not with an installed package: work in a clone, or pass a prompt file of your own."
        )
    got = "none in that directory" if path.is_dir() else "no such file or directory"
    raise PromptError(f"{path}: expected prompts in .jsonl, .csv or .parquet files, got {got}. Check the path.")


def _jsonl_rows(file: Path) -> Rows:
    # Only "\n" ends a line: str.splitlines would also cut at the U+2028 that a JSON string may hold.
    for number, line in enumerate(_decoded(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=partial(_no_repeats, where=where))
        except PromptError:
            raise
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{where}: expected a JSON object, got invalid JSON ({error}). Mend the line.") from error
        if not isinstance(row, dict):
            raise PromptError(f"{where}: expected a JSON object, got {_shown(row)}. Write one object per line.")
        yield where, row


def _csv_rows(file: Path) -> Rows:
    number = 0  # the header
    try:
        reader = csv.reader(io.StringIO(_decoded(file), newline=""), strict=True)
        header = next(reader, [])
        _no_repeats([(name, "") for name in header], f"{file}, header")
        for number, cells in enumerate((cells for cells in reader if cells), start=1):
            where = f"{file}, row {number}"
            if len(cells) != len(header):
                raise PromptError(
                    f"{where}: expected {len(header)} cells as in the header, got {len(cells)}. "
                    "Quote a text that holds commas or line breaks."
                )
            yield where, {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise PromptError(
            f"{file}, after row {number}: expected valid CSV, got an error ({error}). {_csv_advice(error)}"
        ) from error


def _csv_advice(error: csv.Error) -> str:
    if "field limit" not in str(error):
        return "Check the quotes there."
    return (
        f"Write texts of more than {csv.field_size_limit():,} characters as .jsonl, or close the quote left open there."
    )


def _parquet_rows(file: Path) -> Rows:
    try:
        frame = pl.read_parquet(file, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise PromptError(f"{file}: expected a Parquet file, got an error ({error}). Write it again.") from error
    for number, row in enumerate(frame.iter_rows(named=True), start=1):
        yield f"{file}, row {number}", row


_READERS: dict[str, Callable[[Path], Rows]] = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}


def _decoded(file: Path) -> str:
    """The file's text without a byte order mark (spreadsheets write one)."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise PromptError(f"{file}: expected a readable file, got an error ({error}). Check the path.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1  # the decoder's own bytes: without the mark
        raise PromptError(
            f"{file}, line {line}: expected UTF-8, got the byte 0x{error.object[error.start]:02x}. "
            "Save the file as UTF-8."
        ) from error


def _prompt(row: Row, where: str, source: str) -> Prompt:
    """The checked prompt of a row, defaults filled in."""
    for field in row:
        _one_of(where, "a field", field, _FIELDS, "Rename it or take it out.")
    given = {field: _text(value, field, where) for field, value in row.items() if value is not None}
    for field in _REQUIRED:
        if field not in given:
            raise PromptError(f"{where}, field '{field}': expected a value, got nothing. Every row needs one.")
    for field, allowed in _CHOICES.items():
        if field in given:
            _one_of(f"{where}, field '{field}'", "a value", given[field], allowed)
    script = given.get("script", "std")
    doc_id = f"{given['group_id']}-{given['lang']}" + ("" if script == "std" else f"-{script}")
    defaults = {"doc_id": doc_id, "kind": "parallel", "split": split_of(given["group_id"]), "source": source}
    return Prompt(**(defaults | given))


def _text(value: object, field: str, where: str) -> str:
    """`value` when it is text that can be stored and compared, else PromptError."""
    place = f"{where}, field '{field}'"
    if not isinstance(value, str):
        raise PromptError(f"{place}: expected text, got {_shown(value)}. Write it as a string.")
    if not value.strip():
        raise PromptError(
            f"{place}: expected text, got a blank {_shown(value)}. Write the text, or leave the field out."
        )
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise PromptError(f"{place}: expected Unicode text, got half a surrogate pair in {_shown(value)}. Mend it.")
    if field not in ("text", "answer") and value != value.strip():
        raise PromptError(f"{place}: expected no space at the ends, got {_shown(value)}. Take it out.")
    return value


def _no_repeats(pairs: Sequence[tuple[str, Any]], where: str) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise PromptError(f"{where}, field '{repeated}': expected it once, got it twice. Keep one.")
    return row


def _check_doc_ids(placed: list[tuple[str, Prompt]]) -> None:
    seen: dict[str, str] = {}
    for where, prompt in placed:
        if prompt.doc_id in seen:
            raise PromptError(
                f"{where}, field 'doc_id': expected a doc_id of its own, got {prompt.doc_id!r}, which is also at "
                f"{seen[prompt.doc_id]}. Change one of them."
            )
        seen[prompt.doc_id] = where


def _check_groups(placed: list[tuple[str, Prompt]]) -> None:
    """Rows of one group differ in language or script, and agree in whatever belongs to the group."""
    rows: dict[tuple[str, str, str], str] = {}
    first: dict[str, tuple[str, Prompt]] = {}
    for where, prompt in placed:
        there = rows.setdefault((prompt.group_id, prompt.lang, prompt.script), where)
        if there != where:
            raise PromptError(
                f"{where}, field 'group_id': expected one row in {prompt.lang} and script {prompt.script} per group, "
                f"got a second one in group {prompt.group_id!r} (the first is at {there}). Change its group_id."
            )
        there, leader = first.setdefault(prompt.group_id, (where, prompt))
        for field in _SAME_IN_GROUP:
            ours, theirs = getattr(prompt, field), getattr(leader, field)
            if ours != theirs:
                raise PromptError(
                    f"{where}, field '{field}': expected {theirs!r} as in the rest of group {prompt.group_id!r} "
                    f"({there}), got {ours!r}. Make them agree."
                )


def _one_of(where: str, what: str, value: str, allowed: Sequence[str], todo: str = "Check the spelling.") -> None:
    if value not in allowed:
        raise PromptError(f"{where}: expected {what} among {', '.join(allowed)}, got {_shown(value)}. {todo}")


def _shown(value: object) -> str:
    """A value as an error shows it: short, on one line, with its type when it is not text."""
    shown = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return shown if isinstance(value, str) else f"{type(value).__name__} {shown}"
