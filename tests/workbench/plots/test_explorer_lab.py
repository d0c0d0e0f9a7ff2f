"""The explorer in a real JupyterLab: run, as a widget with its selection in Python, and in a notebook nobody trusts."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest
from routed import frames

from workbench.plots.explorer import explore

REPOSITORY = Path(__file__).resolve().parents[3]
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="needs Debian's chromium"),
]
sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("jupyterlab", reason="needs the extra notebooks")
pytest.importorskip("anywidget", reason="needs the extra notebooks")

TEXTS = {"tea-ja": ["お茶", "と", "珈琲"], "tea-en": ["Tea", " and", " coffee"]}
CELLS = [
    f"from routed import frames\nfrom workbench import explore\nview = explore(*frames({TEXTS!r}), n_experts=8)\nview",
    "widget = view.widget()\nwidget",
    "print('chosen', widget.selection['doc_id'], widget.selection['pos'])",
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab over two notebooks: one to run, one with stored outputs that is not trusted."""
    folder = tmp_path_factory.mktemp("lab")
    fresh = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    fresh.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(fresh, folder / "fresh.ipynb")
    html = explore(*frames(TEXTS), n_experts=8)._repr_html_()
    output = nbformat.v4.new_output("execute_result", data={"text/html": html}, execution_count=1)
    stored = nbformat.v4.new_code_cell("view", execution_count=1, outputs=[output])
    nbformat.write(nbformat.v4.new_notebook(cells=[stored]), folder / "stored.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/lab/tree/{{}}?token=t&reset"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--IdentityProvider.token=t", f"--ServerApp.root_dir={folder}"]  # fmt: skip
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "kernels", REPOSITORY / "tests")))
    own = {name: str(folder / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    server = subprocess.Popen(
        command, env={**os.environ, **own, "PYTHONPATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/api?token=t")
        yield address
    finally:
        server.kill()  # it asks its kernels for minutes on a busy machine; they end when it is gone
        server.wait()


def wait_for(address: str) -> None:
    end = time.monotonic() + 120
    while True:
        try:
            with urlopen(address):
                return
        except URLError:
            assert time.monotonic() < end, "JupyterLab did not start"
            time.sleep(0.5)


@pytest.fixture
def page() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1400, "height": 1600})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def test_it_runs_in_a_notebook_and_python_gets_the_selection(lab: str, page: Any) -> None:
    page.goto(lab.format("fresh.ipynb"))
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


def test_in_a_notebook_nobody_trusts_the_text_stays(lab: str, page: Any) -> None:
    page.goto(lab.format("stored.ipynb"))
    page.get_by_text("This view needs scripts").wait_for()
    assert page.locator(".wbx-text").count() == 0
    first = page.locator("[title^='id 100, user; layers 0 to 2: ']").first
    assert first.inner_text() == "お茶"
