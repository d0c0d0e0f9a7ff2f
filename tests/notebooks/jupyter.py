"""JupyterLab over a copy of the notebooks, and what a page of it complains about."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import nbformat

from notebooks.execute import environment
from tests.notebooks.checks import PLOTLY

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage"]
# JupyterLab's own, on a machine without network: it asks for news, and for a layout that was never saved.
_HARMLESS = ("/api/news", "/api/workspaces", "/lab/api/workspaces", "favicon")


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: `address` takes a file name; `settings` is its folder of user settings."""

    address: str
    settings: Path

    def url(self, name: str) -> str:
        return self.address.format(name)

    def use_theme(self, theme: str) -> None:
        """For pages that are loaded from now on: JupyterLab Light or JupyterLab Dark."""
        self.set("@jupyterlab/apputils-extension/themes", {"theme": theme})

    def set(self, plugin: str, values: dict[str, Any]) -> None:
        path = self.settings / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))


@contextmanager
def running_lab(folder: Path, notebooks: Sequence[Path] = ()) -> Iterator[Lab]:
    """JupyterLab over `folder`, with copies of the notebooks, which draws every cell at once and asks for no news."""
    for path in notebooks:
        shutil.copy(path, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lab = Lab(f"http://127.0.0.1:{port}/lab/tree/{{}}?token=t&reset", folder / ".settings")
    lab.set("@jupyterlab/notebook-extension/tracker", {"windowingMode": "none"})
    lab.set("@jupyterlab/apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False})
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    own = {name: str(folder / f".{name.lower()}") for name in names} | {"JUPYTERLAB_SETTINGS_DIR": str(lab.settings)}
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--IdentityProvider.token=t", f"--ServerApp.root_dir={folder}",
    ]  # fmt: skip
    server = subprocess.Popen(
        command, env={**environment(folder), **own}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        _wait_for(f"http://127.0.0.1:{port}/api?token=t")
        yield lab
    finally:
        os.killpg(server.pid, 9)  # with its kernels; asked politely it waits for them for minutes on a busy machine
        server.wait()


def _wait_for(address: str) -> None:
    end = time.monotonic() + 180
    while True:
        try:
            with urlopen(address):
                return
        except URLError:
            assert time.monotonic() < end, "JupyterLab did not start"
            time.sleep(0.5)


@dataclass
class Watched:
    """A page and what it complained about: errors on the console, exceptions, and (offline) requests."""

    page: Any
    problems: list[str] = field(default_factory=list)


@contextmanager
def browser_page(offline: bool = False, **context: Any) -> Iterator[Watched]:
    """A page of a fresh chromium. Its `problems` are for the caller to look at."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_context(offline=offline, **context).new_page()
        page.set_default_timeout(120_000)
        watched = Watched(page)
        page.on("console", lambda message: _note(watched, message))
        page.on("pageerror", lambda error: watched.problems.append(str(error)))
        if offline:
            page.on("request", lambda request: _note_request(watched, request.url))
        yield watched
        browser.close()


def _note(watched: Watched, message: Any) -> None:
    where = str((message.location or {}).get("url", ""))
    if message.type == "error" and not any(part in where for part in _HARMLESS):
        watched.problems.append(f"{message.text} ({where})")


def _note_request(watched: Watched, url: str) -> None:
    if not url.startswith(("file:", "data:", "blob:")):
        watched.problems.append(f"a request: {url}")


def n_figures(path: Path) -> int:
    """Stored in a notebook."""
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return sum(PLOTLY in output.get("data", {}) for output in outputs)


def wait_for_figures(page: Any, n: int) -> None:
    """Until that many figures have something drawn in them; raises AssertionError when there are more."""
    marks = ".point, .heatmaplayer image, path.js-line, .trace"
    page.wait_for_function(
        "([n, marks]) => [...document.querySelectorAll('.js-plotly-plot')]"
        ".filter(figure => figure.querySelector(marks)).length >= n",
        arg=[n, marks],
    )
    assert page.locator(".js-plotly-plot").count() == n
