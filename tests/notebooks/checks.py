"""What a committed notebook must be, and what may not change when it is run again."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

MAX_BYTES = 1_500_000
MAX_CODE_CELLS = 30
MAX_LINES = 24
PLOTLY = "application/vnd.plotly.v1+json"
SUMMARY = "日本語の要約"
CLOSING = "## What this does not show"

_JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
_MACHINE_PATH = re.compile(r"(?<![\w.:/])/(work|root|home|tmp|Users|usr|opt|var)/")
_CODE = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|https?://\S+", re.S)
# Numbers that name something: 95% intervals, arXiv ids, and those joined to a word (32B-A3B, LLM-jp-4, H100, int8).
_NAMES = re.compile(r"95%|arXiv \d{4}\.\d{4,5}|[A-Za-z][\w.]*(-[\w.]+)*-?\d[\w.-]*|\d+[A-Za-z][\w-]*")
_NUMBER = re.compile(r"\d[\d,.]*%?")


def problems(path: Path) -> list[str]:
    """Everything that is wrong with a committed notebook, a line each."""
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    found = [*_file_problems(path, text, notebook), *_form_problems(notebook)]
    for place, cell in enumerate(notebook.cells):
        checks = _code_problems(cell) if cell.cell_type == "code" else _prose_problems(cell.source)
        found += [f"cell {place}: {problem}" for problem in checks]
    return found


def _file_problems(path: Path, text: str, notebook: nbformat.NotebookNode) -> Iterator[str]:
    size = path.stat().st_size
    if size > MAX_BYTES:
        yield f"{size:,} bytes: expected at most {MAX_BYTES:,}"
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        yield f"not a valid notebook: {error.message}"
    if "widgets" in notebook.metadata:
        yield "widget state in the metadata"
    for found in _MACHINE_PATH.finditer(text):
        yield f"a machine path: {text[found.start() : found.start() + 40]!r}"
    expected = [f"cell-{place:02}" for place in range(len(notebook.cells))]
    if [cell.get("id") for cell in notebook.cells] != expected:
        yield "cell ids: expected cell-00, cell-01 ... in order"


def _form_problems(notebook: nbformat.NotebookNode) -> Iterator[str]:
    cells, code = notebook.cells, [cell for cell in notebook.cells if cell.cell_type == "code"]
    head = cells[0].source if cells and cells[0].cell_type == "markdown" else ""
    if not head.startswith("# ") or "**Question:" not in head:
        yield "the first cell: expected a title and **Question: ...**"
    if len(_JAPANESE.findall(head.partition(SUMMARY)[2])) < 60:
        yield f"the first cell: expected {SUMMARY} with a Japanese summary"
    if not cells or cells[-1].cell_type != "markdown" or not cells[-1].source.startswith(CLOSING):
        yield f"the last cell: expected {CLOSING!r}"
    tagged = [place for place, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", [])]
    if tagged != [0]:
        yield "the tag `parameters`: expected on the first code cell alone"
    if len(code) > MAX_CODE_CELLS:
        yield f"{len(code)} code cells: expected at most {MAX_CODE_CELLS}"
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        yield "cells that were not run, or not from top to bottom in a fresh kernel"
    if not any(PLOTLY in data for cell in code for data in _bundles(cell)):
        yield "no figure"


def _code_problems(cell: nbformat.NotebookNode) -> Iterator[str]:
    lines = len(cell.source.splitlines())
    if lines > MAX_LINES:
        yield f"{lines} lines: expected at most {MAX_LINES}"
    if "execution" in cell.metadata:
        yield "times of execution in the metadata"
    for output in cell.outputs:
        if output.output_type == "error":
            yield f"an error output: {output.ename}"
        if output.output_type == "stream" and output.name == "stderr":
            yield f"text on stderr: {output.text[:60]!r}"
    for data in _bundles(cell):
        if any("widget" in kind for kind in data):
            yield "a widget, which shows nothing in a saved notebook"
        if "plotly.js v" in str(data.get("text/html", "")):
            yield "plotly.js inside an output: run with PLOTLY_RENDERER=plotly_mimetype"
    for text in _sentences(cell.source):
        yield from _prose_problems(text)


def _prose_problems(text: str) -> Iterator[str]:
    for number in typed_numbers(text):
        yield f"a typed number in prose: {number!r}. Compute it, or say it in words"


def typed_numbers(text: str) -> list[str]:
    """Numbers in Markdown that are neither code, nor addresses, nor parts of names, nor of numbered lists."""
    prose = re.sub(r"^\s*\d+\.\s", " ", _CODE.sub(" ", text), flags=re.M)
    return _NUMBER.findall(_NAMES.sub(" ", prose))


def _sentences(source: str) -> Iterator[str]:
    """The text typed into `Markdown(...)` and into every f-string beside it; what is computed is left out."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a magic; it holds no Markdown(...)
        return
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node.func) == "Markdown"]
    inside = {id(node) for call in calls for node in ast.walk(call)}
    beside = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) and id(node) not in inside]
    formats = {id(node.format_spec) for node in ast.walk(tree) if isinstance(node, ast.FormattedValue)}
    for node in [*calls, *(node for node in beside if calls and id(node) not in formats)]:
        yield "".join(_typed(node))


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _typed(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FormattedValue):
        yield " "
    elif isinstance(node, ast.Constant):
        yield str(node.value)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _typed(child)


def drift(committed: nbformat.NotebookNode, fresh: nbformat.NotebookNode) -> list[str]:
    """Where two runs of one notebook differ in structure: cells, kinds of output, traces of figures, columns."""
    old, new = committed.cells, fresh.cells
    if [(cell.cell_type, cell.source) for cell in old] != [(cell.cell_type, cell.source) for cell in new]:
        return ["other cells"]
    pairs = [(structure(before), structure(after)) for before, after in zip(old, new, strict=True)]
    return [
        f"cell {place}: expected {json.dumps(before, ensure_ascii=False)}, got {json.dumps(after, ensure_ascii=False)}"
        for place, (before, after) in enumerate(pairs)
        if before != after
    ]


def structure(cell: nbformat.NotebookNode) -> list[list[Any]]:
    """Of each output: its type, its media types, the kinds of a figure's traces, the columns of a table."""
    return [
        [output.output_type, sorted(output.get("data", {})), _traces(output.get("data", {})), _columns(output)]
        for output in cell.get("outputs", [])
    ]


def _traces(data: dict[str, Any]) -> list[str]:
    return [trace["type"] for trace in data.get(PLOTLY, {"data": []})["data"]]


def _columns(output: nbformat.NotebookNode) -> list[str]:
    html = str(output.get("data", {}).get("text/html", ""))
    head = re.search(r'class="dataframe"><thead><tr>(.*?)</tr>', html, re.S)
    return re.findall(r"<th>(.*?)</th>", head[1]) if head else []


def _bundles(cell: nbformat.NotebookNode) -> list[dict[str, Any]]:
    return [output.data for output in cell.outputs if "data" in output]
