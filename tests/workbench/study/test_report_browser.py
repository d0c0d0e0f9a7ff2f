"""The page in a real browser, without network, light and dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from workbench.io.runs import Run
from workbench.study import write_report

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="needs Debian's chromium"),
]
sync_api = pytest.importorskip("playwright.sync_api")


@dataclass
class Opened:
    page: object
    problems: list[str] = field(default_factory=list)  # console errors, exceptions, requests to anywhere but the file


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["light", "dark"])
def opened(request: pytest.FixtureRequest, browser, finished_run: Run) -> Iterator[Opened]:
    path = write_report(finished_run)
    context = browser.new_context(color_scheme=request.param, viewport={"width": 1280, "height": 900})
    context.set_offline(True)
    context.set_default_timeout(120_000)  # a page of 5 MB on a machine that does other things
    page = context.new_page()
    found = Opened(page)

    def refuse(route) -> None:
        found.problems.append(route.request.url)
        route.abort()

    page.route(lambda url: not url.startswith(("file:", "data:", "blob:")), refuse)
    page.on("console", lambda message: found.problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: found.problems.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.main-svg').length > 0")
    yield found
    context.close()


def test_every_figure_is_drawn_and_nothing_complains(opened: Opened, tmp_path: Path) -> None:
    places = opened.page.locator("[data-figure]").count()
    assert places == 17
    opened.page.wait_for_function(f"document.querySelectorAll('.js-plotly-plot').length === {places}")
    drawn = opened.page.eval_on_selector_all(
        ".js-plotly-plot",
        "figures => figures.map(f => f.querySelectorAll('.point, .heatmaplayer image, path.js-line').length)",
    )
    assert all(marks > 0 for marks in drawn), drawn
    opened.page.screenshot(path=tmp_path / "report.png", full_page=True)
    assert (tmp_path / "report.png").stat().st_size > 50_000
    assert opened.problems == []


def test_hovering_a_cell_tells_layer_expert_and_load(opened: Opened) -> None:
    figure = opened.page.locator("[data-figure=load_by_language]")
    figure.scroll_into_view_if_needed()
    box = figure.locator(".heatmaplayer image").first.bounding_box()
    opened.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 3)
    label = figure.locator(".hoverlayer .hovertext").first
    label.wait_for(timeout=5000)
    assert "expert" in label.text_content()
    assert "load" in label.text_content()


def test_text_is_readable_on_the_page_of_either_scheme(opened: Opened) -> None:
    colours = opened.page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
        " getComputedStyle(document.querySelector('.xtick text')).fill]"
    )
    page, body, tick = (
        sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 765 for colour in colours
    )
    assert abs(page - body) > 0.6
    assert abs(page - tick) > 0.35
    assert not opened.page.evaluate("document.documentElement.scrollWidth > window.innerWidth")  # no sideways scrolling


def test_hostile_prompt_text_runs_nothing(opened: Opened) -> None:
    assert opened.page.locator("body img, body iframe").count() == 0
    scripts = opened.page.locator("script:not([type])").count()
    assert scripts == 3
    assert opened.problems == []


def test_the_explorer_of_the_report_is_driven_by_mouse_and_keyboard(opened: Opened) -> None:
    page = opened.page
    place = page.locator("[data-workbench-explorer]")
    place.scroll_into_view_if_needed()
    assert place.locator(".wbx-text").count() == 2, "opens with both languages of one prompt"
    titles = place.locator(".wbx-title").all_inner_texts()
    assert titles[0].startswith("Japanese, medium effort")
    assert titles[1].startswith("English, medium effort")
    token = place.locator(".wbx-text").nth(1).locator(".wbx-in-user [data-t]").nth(1)
    token.hover()
    assert f"“{token.inner_text()}”" in place.locator(".wbx-map-title").nth(1).inner_text()

    place.get_by_label("beside").select_option(index=3)  # another effort of the same prompt
    assert place.locator(".wbx-title").nth(1).inner_text().startswith("Japanese, low effort")
    place.get_by_label("colour").select_option("pair")
    assert "bits" in place.locator(".wbx-legend").inner_text()

    place.locator(".wbx-text [data-t][tabindex='0']").first.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert place.locator(".wbx-pinned").get_attribute("data-t") == "1"
    place.locator(".wbx-map").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert place.locator(".wbx-card").is_visible()
    page.keyboard.press("Escape")
    assert place.locator(".wbx-card").is_hidden()
    assert place.locator(".wbx-pinned").count() == 0
    assert opened.problems == []


def test_a_click_on_an_expert_leads_to_its_card_and_back(opened: Opened) -> None:
    page = opened.page
    place, canvas = page.locator("[data-workbench-explorer]"), page.locator(".wbx-map").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    canvas.click(position={"x": 34 + (box["width"] - 34) * 5.5 / 8, "y": (box["height"] - 20) * 1.5 / 2})
    assert place.locator(".wbx-card h3").inner_text().startswith("Layer 1, expert 5")
    place.get_by_role("link", name="to its card").click()
    card = page.locator("#expert-1-5")
    card.wait_for(state="visible")
    page.wait_for_function(
        "() => { const box = document.getElementById('expert-1-5').getBoundingClientRect();"
        " return box.top >= -1 && box.top < innerHeight; }"
    )
    page.locator("#expert-1-2 a").click()
    assert place.locator(".wbx-card h3").inner_text().startswith("Layer 1, expert 2")
    page.wait_for_function("document.getElementById('explorer').getBoundingClientRect().top < innerHeight")
    page.keyboard.press("Escape")
    assert opened.problems == []


def test_without_scripts_the_conversations_stay_readable(browser, finished_run: Run) -> None:
    path = write_report(finished_run)
    page = browser.new_context(java_script_enabled=False).new_page()
    page.set_default_timeout(120_000)
    page.goto(path.as_uri())
    assert page.get_by_text("This view needs scripts").is_visible()
    token = page.locator(".wbx-plain span[title]").first
    assert token.is_visible()
    assert "layers 0 to 1" in token.get_attribute("title")
    assert page.locator(".wbx-plain").all_inner_texts()
    page.context.close()
