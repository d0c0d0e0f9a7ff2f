"""What the site holds besides docs/*.md: the READMEs, the notebooks, the commands and the reference of every module.

mkdocs calls the functions that begin with `on_`. Links are written for the repository, where they work on any host; the
ones to pages of the site are turned into links within it, the others into plain text.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any

from markdown import Extension, Markdown
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parents[2]
READMES = {
    "README.md": "index.md",
    "README.ja.md": "index.ja.md",
    "kernels/README.md": "kernels.md",
    "data/README.md": "data.md",
    "data/prompts/README.md": "prompts.md",
}
PACKAGES = ("workbench", "workbench_kernels")
LINK = re.compile(r"(?<!!)\[([^\]\[]*)\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
IMAGE = re.compile(r"!\[([^\]]*)\]\((?!https?:)([^)\s]+)\)")

sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]


class NoMarkup(Extension):
    """`<lang>` in a docstring or on a page is text, as it is meant, and never a tag."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.deregister("html_block")
        md.inlinePatterns.deregister("html")


def on_config(config: Any) -> Any:
    """Pages of docs/ that mkdocs.yml does not place are listed under More; then notebooks, commands and reference."""
    placed = set(_leaves(config.nav))
    docs = sorted(path.relative_to(REPOSITORY / "docs").as_posix() for path in (REPOSITORY / "docs").rglob("*.md"))
    if more := [name for name in docs if name not in placed]:
        config.nav.append({"More": more})
    config.markdown_extensions.append(NoMarkup())
    config.nav.append({"Notebooks": "notebooks.md"})
    config.nav.append({"Commands": "commands.md"})
    config.nav.append({"Reference": [{package: _page(package)} for package in packages()]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that have no file in docs/."""
    for source, page in READMES.items():
        if (REPOSITORY / source).is_file():
            _add(files, config, page, (REPOSITORY / source).read_text(encoding="utf-8"))
    _add(files, config, "notebooks.md", _notebooks(files, config))
    _add(files, config, "commands.md", commands())
    _add(files, config, "assets/site.css", STYLE)
    for package in packages():
        _add(files, config, _page(package), reference(package))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links and images, as they are in the repository, to where they lie in the site."""
    source = {page_: readme for readme, page_ in READMES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def target(link: str) -> str | None:
        place = normpath(f"{dirname(source)}/{link}".lstrip("/"))
        uri = READMES.get(place) or _notebook_page(place) or place.removeprefix("docs/")
        known = files.get_file_from_path(uri) is not None
        return relpath(uri, dirname(page.file.src_uri) or ".") if known else None

    def link(found: re.Match[str]) -> str:
        uri = target(found[2])
        if uri is None and not (REPOSITORY / dirname(source) / found[2]).exists():
            return found[0]  # mkdocs reports it as broken
        return found[1] if uri is None else f"[{found[1]}]({uri}{found[3] or ''})"

    def image(found: re.Match[str]) -> str:
        return f"![{found[1]}]({target(found[2]) or found[2]})"

    outside_code = re.split(r"(^ *```.*?^ *```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    outside_code[::2] = [IMAGE.sub(image, LINK.sub(link, COMMENT.sub("", text))) for text in outside_code[::2]]
    return "".join(outside_code)


# ---- the reference


def modules() -> list[str]:
    """Every public module of both packages, packages included."""
    found = []
    for name in PACKAGES:
        package = importlib.import_module(name)
        walked = pkgutil.walk_packages(package.__path__, f"{name}.", onerror=_fail)
        found += [name, *(module.name for module in walked)]
    return sorted(name for name in found if not any(part.startswith("_") for part in name.split(".")))


def packages() -> list[str]:
    """The packages that have a page; each shows its own modules."""
    return [name for name in modules() if any(other.startswith(f"{name}.") for other in modules())]


def reference(package: str) -> str:
    """The page of a package: itself, and its modules one after the other."""
    inner = set(packages())
    parts = [f"# {package}\n"]
    if package == "workbench":
        parts.append(public_names())
    for name in modules():
        if name == package or (name.rpartition(".")[0] == package and name not in inner):
            parts.append(f"::: {name}\n")
    return "\n".join(parts)


def public_names() -> str:
    """What `import workbench` offers, each with the first sentence of its docstring, linked to where it is defined."""
    workbench = importlib.import_module("workbench")
    rows = ["| name | what |", "| --- | --- |"]
    for name in workbench.__all__:
        value = getattr(workbench, name)
        home = getattr(value, "__module__", None) or workbench._HOMES[name]
        if isinstance(value, dict):  # data has no docstring of its own
            home, text = workbench._HOMES[name], "The released models by name."
        else:
            text = (value.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        rows.append(f"| [`{name}`][{home}.{name}] | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(rows) + "\n"


def _page(package: str) -> str:
    return f"reference/{package}.md"


def _fail(name: str) -> None:
    raise ImportError(f"{name}: expected to be importable, so that its docstrings can be found")


# ---- commands and notebooks


def commands() -> str:
    """The help of every command."""
    from workbench.cli import _parser

    os.environ["COLUMNS"] = "100"
    parser = _parser()
    (choices,) = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    parts = ["# Commands\n", f"```text\n{parser.format_help()}```\n"]
    for name, command in choices.items():
        parts.append(f"## workbench {name}\n\n```text\n{command.format_help()}```\n")
    return "\n".join(parts)


def _notebooks(files: Files, config: Any) -> str:
    """The list of the notebooks; each is added as a page of its own, with the outputs that are stored in it."""
    import nbformat

    from workbench.plots.export import notebook_html

    parts = ["# Notebooks\n", "As they were last run; to run them, `make lab`.\n"]
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted((REPOSITORY / "notebooks").glob("*.ipynb")):
            html = notebook_html(path, Path(folder) / f"{path.stem}.html").read_text(encoding="utf-8")
            _add(files, config, _notebook_page(f"notebooks/{path.name}"), html)
            first = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0].lstrip("# ")
            parts.append(f"- [{path.stem}](notebooks/{path.stem}.html): {first}")
    return "\n".join(parts) + "\n"


def _notebook_page(place: str) -> str:
    return place.removesuffix(".ipynb") + ".html" if place.endswith(".ipynb") else ""


def _add(files: Files, config: Any, uri: str, content: str) -> None:
    if (old := files.get_file_from_path(uri)) is not None:
        files.remove(old)
    files.append(File.generated(config, uri, content=content))


def _leaves(nav: Any) -> Iterator[str]:
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        if isinstance(value, str):
            yield value
        else:
            yield from _leaves(value)


STYLE = """
:root { --md-text-font: "Noto Sans", "Noto Sans CJK JP", "Noto Sans JP", "Hiragino Sans", "Yu Gothic", Meiryo; }
.md-typeset table:not([class]) { font-size: .68rem; }
.md-grid { max-width: 72rem; }
"""
