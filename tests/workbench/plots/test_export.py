"""Figures as files, and in notebooks exported to one page."""

from __future__ import annotations

import re
import shutil
import sys
import zlib
from pathlib import Path

import nbformat
import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest
from plotly.io._base_renderers import PlotlyRenderer

from workbench.errors import RunError
from workbench.plots.distributions import layer_curves
from workbench.plots.export import notebook_html, save_figure

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
with_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="needs Debian's chromium"),
]


def curves() -> go.Figure:
    fig = layer_curves(pl.DataFrame({"lang": ["ja", "ja"], "layer": [0, 1], "mean": [1.0, 2.0]}), "lang", "nats")
    return fig.update_layout(title="日本語 漢字かな")


def notebook(path: Path, extra: dict[str, str]) -> Path:
    """An executed notebook as JupyterLab stores it: two figures by media type, and one more output."""
    data = PlotlyRenderer().to_mimebundle(curves().to_plotly_json())
    cells = [nbformat.v4.new_markdown_cell("# 実験")]
    for bundle in (data, data, extra):
        output = nbformat.v4.new_output("execute_result", data={**bundle, "text/plain": "shown"}, execution_count=1)
        cells.append(nbformat.v4.new_code_cell("fig", execution_count=1, outputs=[output]))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def drawn_offline(path: Path) -> tuple[int, list[str], str]:
    """(figures drawn, requests and errors, text of the page) in a browser without network."""
    sync_api = pytest.importorskip("playwright.sync_api")
    problems: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_context(offline=True).new_page()
        page.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "data:")) else problems.append(request.url),
        )
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_timeout(1500)
        found = page.locator(".js-plotly-plot .main-svg").count() // 2, problems, page.locator("body").inner_text()
        browser.close()
    return found


@pytest.mark.parametrize("marked", [pytest.param(None, marks=with_browser)])
def test_every_figure_of_an_exported_notebook_is_drawn_offline(tmp_path: Path, marked: None) -> None:
    source = notebook(
        tmp_path / "n.ipynb", {"text/html": "<p id='explorer'>before</p><script>explorer.textContent = 'ran'</script>"}
    )
    figures, problems, text = drawn_offline(notebook_html(source, tmp_path / "n.html"))
    assert figures >= 2
    assert problems == []
    assert "ran" in text
    assert "実験" in text


def test_plain_nbconvert_loses_the_figures_and_ours_keeps_them(tmp_path: Path) -> None:
    nbconvert = pytest.importorskip("nbconvert")
    source = notebook(tmp_path / "n.ipynb", {"text/html": "<p>table</p>"})
    plain, _ = nbconvert.HTMLExporter().from_filename(str(source))
    assert "Plotly.newPlot" not in plain
    kept = notebook_html(source, tmp_path / "n.html").read_text(encoding="utf-8")
    assert len(re.findall(r"Plotly\.newPlot\(\s*\"", kept)) == 2
    assert not re.search(r'src="(https?:)?//', kept)
    assert nbformat.read(source, as_version=4).cells[1].outputs[0].data.keys() == {
        "application/vnd.plotly.v1+json",
        "text/plain",
    }


def test_what_is_no_notebook_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected a notebook, got FileNotFoundError"):
        notebook_html(tmp_path / "none.ipynb", tmp_path / "n.html")
    (tmp_path / "bad.ipynb").write_text("no json")
    with pytest.raises(RunError, match="expected a notebook, got NotJSONError"):
        notebook_html(tmp_path / "bad.ipynb", tmp_path / "n.html")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=with_browser) for kind in ("png", "svg", "pdf")])
def test_a_figure_becomes_a_file_of_its_kind(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("kaleido")
    path = save_figure(curves(), tmp_path / f"figure.{kind}", width=600, background="white")
    data = path.read_bytes()
    if kind == "png":
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(data[16:20]) == 1200  # 600 at scale 2
        ink = np.frombuffer(zlib.decompress(b"".join(chunks(data))), np.uint8)
        assert len(np.unique(ink)) > 20
    elif kind == "svg":
        assert "日本語 漢字かな" in data.decode()
        assert "Noto Sans CJK JP" in data.decode()
    else:
        assert data[:5] == b"%PDF-"
        assert len(data) > 5_000


def chunks(png: bytes) -> list[bytes]:
    """The image data chunks of a PNG file."""
    place, found = 8, []
    while place < len(png):
        length = int.from_bytes(png[place : place + 4])
        if png[place + 4 : place + 8] == b"IDAT":
            found.append(png[place + 8 : place + 8 + length])
        place += 12 + length
    return found


def test_other_endings_and_missing_packages_get_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError, match=r"expected a name ending in \.png, \.svg or \.pdf, got \.bmp"):
        save_figure(curves(), tmp_path / "figure.bmp")
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(RunError, match=r"expected kaleido, got no such package\. Install the extra `notebooks`"):
        save_figure(curves(), tmp_path / "figure.png")
    monkeypatch.setitem(sys.modules, "nbconvert", None)
    with pytest.raises(RunError, match="expected nbconvert, got no such package"):
        notebook_html(tmp_path / "n.ipynb", tmp_path / "n.html")


def test_a_browser_that_is_not_there_gets_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kaleido")
    monkeypatch.setattr(go.Figure, "to_image", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no Chrome")))
    with pytest.raises(RunError, match="expected kaleido to draw it with chromium, got RuntimeError: no Chrome"):
        save_figure(curves(), tmp_path / "figure.png")
