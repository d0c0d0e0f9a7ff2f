"""Figures outside a live notebook: as PNG, SVG or PDF files, and inside notebooks exported to one offline page.

A plotly figure in a notebook is stored as JSON that JupyterLab draws. `jupyter nbconvert --to html` leaves it out; what
keeps it is `notebook_html` below, or running the notebook with PLOTLY_RENDERER=plotly_mimetype+notebook, which stores
plotly.js (5 MB) in the notebook itself.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from workbench.errors import RunError

FORMATS = ("png", "svg", "pdf")
PLOTLY_MIME = "application/vnd.plotly.v1+json"


def save_figure(
    fig: go.Figure,
    path: str | Path,
    *,
    width: int = 1000,
    height: int | None = None,
    scale: float = 2,
    background: str | None = None,
) -> Path:
    """Write a figure as .png, .svg or .pdf, by the ending of `path`; returns the path.

    Args:
        width, height: in pixels; height None takes the figure's own.
        scale: PNG pixels per pixel.
        background: "white", say; None stays transparent.

    Needs kaleido (extra `notebooks`) and a chromium or chrome, which kaleido looks for. Raises RunError for another
    ending, when either is missing, or when the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise RunError(f"{path}: expected a name ending in .png, .svg or .pdf, got {path.suffix or 'no ending'}.")
    _need("kaleido", "save_figure")
    shown = go.Figure(fig)
    if background:
        shown.update_layout(paper_bgcolor=background)
    try:
        image = shown.to_image(kind, width=width, height=height or fig.layout.height or 450, scale=scale)
    except Exception as error:  # kaleido and plotly raise their own, and bare RuntimeError, for a missing browser
        raise RunError(
            f"{path}: expected kaleido to draw it with chromium, "
            f"got {type(error).__name__}: {str(error).strip()[:200]} Install chromium, or set BROWSER_PATH to it."
        ) from error
    try:
        path.write_bytes(image)
    except OSError as error:
        raise RunError(f"{path}: expected a place to write, got {error.strerror}. Pass another path.") from None
    return path


def notebook_html(notebook: str | Path, path: str | Path) -> Path:
    """Write an executed notebook as one HTML page that shows every figure and explorer offline; returns its path.

    Nothing is run: the outputs stored in the notebook are shown. The page is 5 MB larger than its outputs, for
    plotly.js, where it has figures. Raises RunError when nbconvert (extra `notebooks`) is missing or a file cannot be
    read or written.
    """
    nbformat, nbconvert = _need("nbformat", "notebook_html"), _need("nbconvert", "notebook_html")
    try:
        found = nbformat.read(notebook, as_version=4)
    except (OSError, nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        raise RunError(f"{notebook}: expected a notebook, got {type(error).__name__}. Check the path.") from None
    figures = [output.data for output in _outputs(found) if PLOTLY_MIME in output.get("data", {})]
    for place, data in enumerate(figures):
        data["text/html"] = _figure_html(data.pop(PLOTLY_MIME), first=place == 0)
    exporter = nbconvert.HTMLExporter(require_js_url="", mathjax_url="", jquery_url="", embed_images=True)
    page, _ = exporter.from_notebook_node(found)
    try:
        Path(path).write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise RunError(f"{path}: expected a place to write, got {error.strerror}. Pass another path.") from None
    return Path(path)


def _outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def _figure_html(stored: dict[str, Any], first: bool) -> str:
    fig = go.Figure({"data": stored["data"], "layout": stored["layout"]}, skip_invalid=True)
    drawn = fig.to_html(full_html=False, include_plotlyjs=False, config={"responsive": True, "displaylogo": False})
    return (f"<script>{get_plotlyjs()}</script>" if first else "") + str(drawn)


def _need(package: str, purpose: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise RunError(f"{purpose}: expected {package}, got no such package. Install the extra `notebooks`.") from None
