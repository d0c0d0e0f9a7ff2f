"""`make docs`: builds without a warning, loads nothing from outside, has no broken link and documents every module."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import workbench

REPOSITORY = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow
pytest.importorskip("mkdocs", reason="the docs extra is not installed")


class Page(HTMLParser):
    """The links, the anchors and what a browser would load of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and "href" in given:
            self.loads.append(given["href"])
        if "src" in given:
            self.loads.append(given["src"])
        self.loads += re.findall(r"url\(['\"]?([^)'\"]+)", given.get("style", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(out)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": paths, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr  # mkdocs.yml is strict: a warning is an error
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_the_pages_are_there(site: Path) -> None:
    docs = {path.relative_to(REPOSITORY / "docs").with_suffix(".html") for path in (REPOSITORY / "docs").rglob("*.md")}
    others = {Path("index.html"), Path("index.ja.html"), Path("commands.html"), Path("data.html"), Path("kernels.html")}
    notebooks = {Path("notebooks") / f"{path.stem}.html" for path in (REPOSITORY / "notebooks").glob("*.ipynb")}
    assert notebooks
    for page in docs | others | notebooks:
        assert (site / page).is_file(), page


def test_no_page_loads_anything_from_outside(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        outside = [link for link in page.loads if urlsplit(link).scheme not in ("", "data") or link.startswith("//")]
        assert outside == [], path.relative_to(site)
    for path in site.rglob("*.css"):
        css = path.read_text(encoding="utf-8")
        outside = [
            url for url in re.findall(r"url\(['\"]?([^)'\"]+)", css) if not url.startswith(("data:", "#", "../", "./"))
        ]
        assert outside == [], path.relative_to(site)
        assert not re.search(r"@import\s+['\"]?https?:", css)


def test_every_link_within_the_site_leads_to_a_page_and_a_place(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in (*page.links, *page.loads):
            parts = urlsplit(link)
            if parts.scheme or link.startswith("//") or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            found = target.is_file() and (
                not anchor or target not in pages or anchor in pages[target].anchors or anchor.startswith("__")
            )
            if not found:
                broken.append(f"{path.relative_to(site)}: {link}")
    assert sorted(set(broken)) == []


def test_every_module_and_every_public_name_is_in_the_reference(site: Path, pages: dict[Path, Page]) -> None:
    anchors = set().union(*(page.anchors for path, page in pages.items() if path.parent.name == "reference"))
    files = [
        *(REPOSITORY / "workbench").rglob("*.py"),
        *(REPOSITORY / "kernels" / "workbench_kernels").rglob("*.py"),
    ]
    roots = {"workbench": REPOSITORY, "workbench_kernels": REPOSITORY / "kernels"}
    for file in files:
        root = next(folder for name, folder in roots.items() if folder / name in file.parents)
        parts = file.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        is_module = (file.parent / "__init__.py").is_file()  # the harness reads its task files by their place
        if is_module and not any(part.startswith("_") for part in parts):
            assert f"{'.'.join(parts)}" in anchors, parts
    index = (site / "reference" / "workbench.html").read_text(encoding="utf-8")
    for name in workbench.__all__:
        link = re.search(rf'<a[^>]*href="([^"]*#workbench[\w.]*\.{name})"[^>]*><code>{name}</code>', index)
        assert link, name
        text = index[link.end() :].split("<td>")[1].split("</td>")[0]
        assert len(text) > 10, f"{name}: no docstring"


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_open_from_the_file_without_a_request_or_an_error(site: Path, scheme: str, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = Path("/usr/bin/chromium")
    if not chromium.exists():
        pytest.skip("needs Debian's chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 900}).new_page()
        page.context.set_offline(True)
        problems: list[str] = []
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith(("file:", "data:", "blob:")) else problems.append(request.url)
            ),
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        for name in ("index.html", "reference/workbench.stats.html", "hardware.html"):
            page.goto((site / name).as_uri())
            shade = page.evaluate("getComputedStyle(document.body).backgroundColor")
            page.screenshot(path=tmp_path / f"{Path(name).stem}-{scheme}.png")
            red = int(re.findall(r"\d+", shade)[0])
            assert (red < 128) == (scheme == "dark"), shade
        browser.close()
    assert problems == []
