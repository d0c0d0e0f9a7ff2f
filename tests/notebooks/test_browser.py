"""The notebooks in a real browser: opened in JupyterLab, run top to bottom, explored, and exported to offline pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from notebooks.execute import FOLDER
from tests.notebooks.checks import PLOTLY
from tests.notebooks.jupyter import CHROMIUM, Lab, browser_page, running_lab
from workbench.plots.export import notebook_html

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
START = "00_start_here.ipynb"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="needs Debian's chromium"),
]
pytest.importorskip("playwright.sync_api")
pytest.importorskip("jupyterlab", reason="needs the extra notebooks")
WINDOW = {"viewport": {"width": 1400, "height": 1100}}


def n_figures(path: Path) -> int:
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return sum(PLOTLY in output.get("data", {}) for output in outputs)


def wait_for_figures(page: Any, n: int) -> None:
    """Until that many figures have something drawn in them, and no more."""
    marks = ".point, .heatmaplayer image, path.js-line, .trace"
    page.wait_for_function(
        "([n, marks]) => [...document.querySelectorAll('.js-plotly-plot')]"
        ".filter(figure => figure.querySelector(marks)).length >= n",
        arg=[n, marks],
    )
    assert page.locator(".js-plotly-plot").count() == n


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """One for each test: a kernel that is still there goes on counting cells where it was."""
    with running_lab(tmp_path, NOTEBOOKS) as lab:
        yield lab


def test_jupyterlab_opens_every_notebook_with_all_its_figures(lab: Lab) -> None:
    lab.use_theme("JupyterLab Light")
    for path in NOTEBOOKS:
        with browser_page(**WINDOW) as watched:
            watched.page.goto(lab.url(path.name))
            wait_for_figures(watched.page, n_figures(path))
            assert watched.problems == [], path.name


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_start_here_runs_top_to_bottom_and_its_explorer_works(lab: Lab, theme: str) -> None:
    lab.use_theme(theme)
    with browser_page(**WINDOW) as watched:
        page = watched.page
        page.goto(lab.url(START))
        page.get_by_text("Python 3 | Idle").or_(page.get_by_text("Python 3 (ipykernel) | Idle")).wait_for()
        assert page.locator("body").get_attribute("data-jp-theme-light") == str("Light" in theme).lower()
        run_all(
            page
        )  # JupyterLab runs scripts of outputs that it saw being made, not of a file that came from elsewhere
        wait_for_figures(page, n_figures(FOLDER / START))
        explore(page)
        assert_readable(page)
        assert watched.problems == []


def run_all(page: Any) -> None:
    """Everything again without its outputs, until the last cell has its number and the kernel is idle."""
    n_code = sum(cell.cell_type == "code" for cell in nbformat.read(FOLDER / START, as_version=4).cells)
    page.get_by_role("menuitem", name="Edit", exact=True).click()
    page.get_by_text("Clear Outputs of All Cells", exact=True).click()
    page.wait_for_function("() => document.querySelectorAll('.js-plotly-plot').length === 0")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    page.locator(".jp-InputPrompt", has_text=f"[{n_code}]:").wait_for(timeout=400_000)
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0


def explore(page: Any) -> None:
    """Hover, click, an expert's card, another text beside, and all of it by keyboard."""
    view = page.locator(".wbx").first
    view.scroll_into_view_if_needed()
    text, title = view.locator(".wbx-text"), view.locator(".wbx-map-title")
    token = text.nth(0).locator("[data-t]").nth(4)
    token.hover()
    hovered = title.first.inner_text()
    text.nth(0).locator("[data-t]").nth(6).hover()
    assert title.first.inner_text() != hovered
    token.click()
    assert view.locator("[aria-selected='true']").count() == 1
    view.get_by_label("beside").select_option(index=1)
    assert text.count() == 2
    text.nth(1).locator("[data-t]").nth(3).click()
    view.locator(".wbx-map").first.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert "expert" in view.locator(".wbx-card").inner_text()
    page.keyboard.press("Escape")
    assert view.locator(".wbx-card").is_hidden()
    view.get_by_label("beside").select_option("")
    text.nth(0).locator("[data-t='2']").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.t") == "3"
    page.keyboard.press("Enter")
    assert view.locator("[aria-selected='true']").get_attribute("data-t") == "3"


def assert_readable(page: Any) -> None:
    """Text of figures and of the explorer stands out from the page in this theme (WCAG contrast of at least 3)."""
    contrast = """selector => {
      const parse = text => text.match(/[\\d.]+/g).map(Number);
      const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      const element = document.querySelector(selector), style = getComputedStyle(element);
      const ink = light(parse(style.fill !== 'none' && element.ownerSVGElement ? style.fill : style.color));
      let ground = element;
      while (ground.parentElement && /rgba\\(.*, 0\\)|transparent/.test(getComputedStyle(ground).backgroundColor))
        ground = ground.parentElement;
      const page = light(parse(getComputedStyle(ground).backgroundColor));
      return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
    }"""
    for selector in (".js-plotly-plot .xtick text", ".js-plotly-plot .ytick text", ".wbx-title"):
        assert page.evaluate(contrast, selector) >= 3, selector


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_exported_page_has_everything_offline(path: Path, tmp_path: Path) -> None:
    exported = notebook_html(path, tmp_path / f"{path.stem}.html")
    with browser_page(offline=True, **WINDOW) as watched:
        watched.page.goto(exported.as_uri())
        wait_for_figures(watched.page, n_figures(path))
        n_explorers = path.read_text(encoding="utf-8").count(r"<div class=\"wbx\"")
        assert watched.page.locator(".wbx[data-mounted]").count() == n_explorers
        assert watched.problems == []
