"""The explorer in a real JupyterLab: run, as a widget with its selection in Python, and in a notebook nobody trusts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from routed import frames

from tests.notebooks.jupyter import CHROMIUM, Lab, browser_page, running_lab
from workbench.plots.explorer import explore

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="needs Debian's chromium"),
]
pytest.importorskip("playwright.sync_api")
pytest.importorskip("jupyterlab", reason="needs the extra notebooks")
pytest.importorskip("anywidget", reason="needs the extra notebooks")

TEXTS = {"tea-ja": ["お茶", "と", "珈琲"], "tea-en": ["Tea", " and", " coffee"]}
CELLS = [
    "from tests.routed import frames\nfrom workbench import explore\n"
    f"view = explore(*frames({TEXTS!r}), n_experts=8)\nview",
    "widget = view.widget()\nwidget",
    "print('chosen', widget.selection['doc_id'], widget.selection['pos'])",
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Over two notebooks: one to run, one with stored outputs that is not trusted."""
    folder = tmp_path_factory.mktemp("lab")
    fresh = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    fresh.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(fresh, folder / "fresh.ipynb")
    html = explore(*frames(TEXTS), n_experts=8)._repr_html_()
    output = nbformat.v4.new_output("execute_result", data={"text/html": html}, execution_count=1)
    stored = nbformat.v4.new_code_cell("view", execution_count=1, outputs=[output])
    nbformat.write(nbformat.v4.new_notebook(cells=[stored]), folder / "stored.ipynb")
    with running_lab(folder) as lab:
        yield lab


@pytest.fixture
def page() -> Iterator[Any]:
    with browser_page(viewport={"width": 1400, "height": 1600}) as watched:
        yield watched.page


def test_it_runs_in_a_notebook_and_python_gets_the_selection(lab: Lab, page: Any) -> None:
    page.goto(lab.url("fresh.ipynb"))
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # before that, running asks for a kernel
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    page.get_by_text("chosen None None").wait_for()
    texts = page.locator(".wbx-text")
    texts.nth(1).wait_for()
    assert texts.count() == 2  # the explorer and its widget
    texts.nth(0).locator("[data-t='1']").click()
    assert "“と” at 1" in page.locator(".wbx-map-title").nth(0).inner_text()
    texts.nth(1).locator("[data-t='2']").click()
    page.locator(".jp-CodeCell").nth(2).locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    page.get_by_text("chosen tea-ja 2").wait_for()


def test_in_a_notebook_nobody_trusts_the_text_stays(lab: Lab, page: Any) -> None:
    page.goto(lab.url("stored.ipynb"))
    page.get_by_text("This view needs scripts").wait_for()
    assert page.locator(".wbx-text").count() == 0
    first = page.locator("[title^='id 100, user; layers 0 to 2: ']").first
    assert first.inner_text() == "お茶"
