"""The committed notebooks: executed, small, clean, and still giving outputs of the same structure when run again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest

from notebooks.execute import FOLDER, execute, stable
from tests.notebooks.checks import CLOSING, SUMMARY, drift, problems

LONGEST = 120  # processor seconds: two minutes even where one core does it all
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_they_are_numbered_from_zero_without_a_gap() -> None:
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{place:02}_" for place in range(11)]


@each
def test_the_committed_file_is_in_order(path: Path) -> None:
    assert problems(path) == []


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, Future]]:
    """Every notebook run again from a copy of its file, two at a time."""
    folder = tmp_path_factory.mktemp("notebooks")
    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(execute, Path(shutil.copy(path, folder))) for path in NOTEBOOKS}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@each
def test_it_runs_and_its_outputs_keep_their_structure(path: Path, fresh: dict[Path, Future], tmp_path: Path) -> None:
    notebook, seconds = fresh[path].result()
    assert seconds < LONGEST
    assert drift(nbformat.read(path, as_version=4), notebook) == []
    written = tmp_path / path.name
    nbformat.write(notebook, written)
    assert problems(written) == []


@pytest.mark.slow
def test_papermill_runs_one_with_other_parameters(tmp_path: Path) -> None:
    papermill = pytest.importorskip("papermill")
    out = tmp_path / "out.ipynb"
    sentences = {"ja": "フランスの首都はパリです。", "en": "The capital of France is Paris."}
    given = {"model_name": "nano-moe-base", "sentences": sentences, "n_groups": 1}
    papermill.execute_notebook(
        FOLDER / "00_start_here.ipynb", out, given, kernel_name="python3", cwd=tmp_path, progress_bar=False
    )
    cells = nbformat.read(out, as_version=4).cells
    place = next(place for place, cell in enumerate(cells) if "injected-parameters" in cell.metadata.get("tags", []))
    assert "parameters" in cells[place - 1].metadata.tags
    said = "".join(str(output.get("data")) for cell in cells[place:] for output in cell.get("outputs", []))
    assert "`nano-moe-base` has" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("01_load_and_verify", {"dtypes": ["bfloat16"]}),
        ("10_nnsight_and_transformerlens", {"dtype": "bfloat16"}),
    ],
)
def test_notebooks_that_compare_numbers_run_in_the_dtype_of_the_real_model(
    name: str, given: dict[str, object], tmp_path: Path
) -> None:
    papermill = pytest.importorskip("papermill")
    done = papermill.execute_notebook(  # raises for a cell that fails
        FOLDER / f"{name}.ipynb", tmp_path / "out.ipynb", given, kernel_name="python3", cwd=tmp_path, progress_bar=False
    )
    assert all(cell.execution_count for cell in done.cells if cell.cell_type == "code")
    assert "bfloat16" in str([cell.get("outputs") for cell in done.cells])


# --- the checks themselves ------------------------------------------------------------------------------------------


def notebook(*extra: nbformat.NotebookNode, last: str = f"{CLOSING}\n\n- Much.") -> nbformat.NotebookNode:
    """A small notebook that nothing is wrong with, plus cells before the closing one."""
    v4, japanese = (
        nbformat.v4,
        "このノートブックでは、日本語と英語の文がどのエキスパートに送られるかを調べ、区間と対照を添えて示します。" * 2,
    )
    figure = {"data": [{"type": "scatter"}, {"type": "heatmap"}], "layout": {}}
    table = '<table border="1" class="dataframe"><thead><tr><th>layer</th><th>load</th></tr></thead></table>'
    outputs = [
        v4.new_output("display_data", {"application/vnd.plotly.v1+json": figure}),
        v4.new_output("execute_result", {"text/html": table, "text/plain": "t"}, execution_count=2),
    ]
    cells = [
        v4.new_markdown_cell(f"# Title\n\n**Question: which?**\n\n{SUMMARY}:{japanese}"),
        v4.new_code_cell("model_name = 'nano'", metadata={"tags": ["parameters"]}),
        v4.new_code_cell("draw()", outputs=outputs),
        *extra,
        v4.new_markdown_cell(last),
    ]
    return numbered(v4.new_notebook(cells=cells))


def numbered(made: nbformat.NotebookNode) -> nbformat.NotebookNode:
    n_run = 0
    for place, cell in enumerate(made.cells):
        cell["id"] = f"cell-{place:02}"
        if cell.cell_type == "code":
            n_run += 1
            cell.execution_count = n_run
    return made


def found(made: nbformat.NotebookNode, folder: Path) -> str:
    path = folder / "n.ipynb"
    nbformat.write(made, path)
    return "\n".join(problems(path))


def code(source: str = "1", **output: object) -> nbformat.NotebookNode:
    return nbformat.v4.new_code_cell(source, outputs=[nbformat.v4.new_output(**output)] if output else [])


def prose(text: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_markdown_cell(text)


def test_a_notebook_in_order_passes(tmp_path: Path) -> None:
    assert found(notebook(), tmp_path) == ""


ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}
STDERR = {"output_type": "stream", "name": "stderr", "text": "Warning: old\n"}
WIDGET = {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}}}
SCRIPT = {"output_type": "display_data", "data": {"text/html": "<script>/* plotly.js v3.1.0 */</script>"}}
WHERE = {"output_type": "stream", "name": "stdout", "text": "/" + "home/someone/run"}


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        (code(**ERROR), "an error output: ValueError"),
        (code(**STDERR), "text on stderr: 'Warning: old"),
        (code(**WIDGET), "a widget"),
        (code(**SCRIPT), "plotly.js inside an output"),
        (code(**WHERE), "a machine path"),
        (code("x\n" * 30), "30 lines: expected at most"),
        (nbformat.v4.new_code_cell("1", metadata={"execution": {"iopub.status.busy": "now"}}), "times of execution"),
        (nbformat.v4.new_code_cell("1", metadata={"tags": ["parameters"]}), "the tag `parameters`"),
        (prose("It takes 17 experts."), "a typed number in prose: '17'"),
        (prose("A load of 0.25 is even."), "a typed number in prose: '0.25'"),
        (code("display(Markdown(f'All {n} of 12 layers'))"), "a typed number in prose: '12'"),
        (code("line = f'{n:.3f} of 12 layers'\ndisplay(Markdown(line))"), "a typed number in prose: '12'"),
    ],
)
def test_each_fault_is_found(cell: nbformat.NotebookNode, problem: str, tmp_path: Path) -> None:
    assert problem in found(notebook(cell), tmp_path)


def test_faults_of_the_whole_file_are_found(tmp_path: Path) -> None:
    assert "bytes: expected at most" in found(notebook(code(output_type="stream", text="x" * 1_600_000)), tmp_path)
    assert "31 code cells" in found(notebook(*[code() for _ in range(29)]), tmp_path)
    widgets = notebook()
    widgets.metadata["widgets"] = {"state": {}}
    assert "widget state" in found(widgets, tmp_path)
    skipped = notebook(code())
    skipped.cells[-2].execution_count = None
    assert "cells that were not run" in found(skipped, tmp_path)
    reordered = notebook(code())
    reordered.cells[-2].execution_count = 9
    assert "cells that were not run" in found(reordered, tmp_path)
    random = notebook()
    random.cells[1]["id"] = "a1b2c3"
    assert "cell ids" in found(random, tmp_path)
    bare = notebook()
    bare.cells[2].outputs = []
    assert "no figure" in found(bare, tmp_path)


def test_faults_of_form_are_found(tmp_path: Path) -> None:
    untagged = notebook()
    untagged.cells[1].metadata.pop("tags")
    assert "the tag `parameters`" in found(untagged, tmp_path)
    english = notebook()
    english.cells[0].source = f"# Title\n\n**Question: which?**\n\n{SUMMARY}: only English here."
    assert SUMMARY in found(english, tmp_path)
    english.cells[0].source = "Title"
    assert "a title and **Question" in found(english, tmp_path)
    assert "the last cell" in found(notebook(last="## The end"), tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "The 32B-A3B and LLM-jp-4 8B run on an H100, in float32 or int8; see `03_japanese_and_english` and `x[3]`.",
        "1. First, as in arXiv 2402.16438, the 95% interval\n2. then [the page](docs/01.md)",
        "日本語の文とその英訳を、bfloat16 で比べます。",
    ],
)
def test_names_code_lists_and_addresses_are_no_typed_numbers(text: str, tmp_path: Path) -> None:
    assert found(notebook(prose(text)), tmp_path) == ""


def test_computed_numbers_are_none(tmp_path: Path) -> None:
    fine = "display(Markdown(f'{len(x):,} of {total + 1} experts, {a[0]:.2f} nats' + f'and {b}'))\nlabel = f'layer {n}'"
    assert found(notebook(code(fine)), tmp_path) == ""


def test_drift_is_structural(tmp_path: Path) -> None:
    committed = notebook(code(output_type="stream", text="0.1"))
    same = notebook(code(output_type="stream", text="0.2"))
    same.cells[2].outputs[0].data["application/vnd.plotly.v1+json"]["data"][0]["y"] = [1, 2]
    assert drift(committed, same) == []
    for change, what in (
        (lambda n: n.cells[2].outputs[0].data["application/vnd.plotly.v1+json"]["data"].pop(), "scatter"),
        (lambda n: n.cells[2].outputs[0].data["application/vnd.plotly.v1+json"]["data"][0].update(type="bar"), "bar"),
        (lambda n: n.cells[2].outputs.pop(), "execute_result"),
        (lambda n: n.cells[2].outputs[1].data.pop("text/html"), "text/html"),
        (lambda n: n.cells[2].outputs[1].data.update({"text/html": _table("layer", "loads")}), "loads"),
        (lambda n: n.cells[3].outputs.clear(), "stream"),
    ):
        other = notebook(code(output_type="stream", text="0.1"))
        change(other)
        (difference,) = drift(committed, other)
        assert what in difference
    assert drift(committed, notebook(code("2"))) == ["other cells"]


def _table(*columns: str) -> str:
    return f'<table class="dataframe"><thead><tr>{"".join(f"<th>{name}</th>" for name in columns)}</tr></thead></table>'


def test_what_differs_between_runs_without_meaning_is_left_out() -> None:
    made = notebook()
    made.cells[1].metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
    made.metadata["language_info"] = {"name": "python", "version": "3.11.7"}
    made.metadata["widgets"] = {"state": {}}
    kept = stable(made)
    assert "execution" not in kept.cells[1].metadata
    assert kept.cells[1].metadata["tags"] == ["parameters"]
    assert kept.metadata["language_info"] == {"name": "python"}
    assert "widgets" not in kept.metadata
