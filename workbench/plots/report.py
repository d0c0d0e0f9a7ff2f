"""One self-contained page from figures, numbers and example conversations: no network, nothing beside the file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from workbench.plots.explorer import Explorer, explorer_script

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Fact:
    """One line of a card: what it is about, and the sentence."""

    name: str
    text: str


@dataclass(frozen=True)
class Card:
    """One expert of the atlas. contexts: (text before, the token, text after, language) of tokens it weighed most."""

    layer: int
    expert: int
    facts: Sequence[Fact]
    contexts: Sequence[tuple[str, str, str, str]]
    flagged: bool = False


def render_report(
    figures: Mapping[str, go.Figure],
    facts: Mapping[str, Any],
    explorer: Explorer | None,
    settings: Sequence[tuple[str, str]],
    cards: Sequence[Card] = (),
) -> str:
    """The page as HTML text.

    Args:
        figures: by the name under which report.html.j2 places them; one that is absent leaves its section out.
        facts: the numbers that the template's sentences mention.
        explorer: some of the conversations, token by token; None leaves the section out.
        settings: rows (name, value) of the settings table.
        cards: the atlas of experts, in order of layer and expert.

    Everything is escaped: prompts and answers may hold any markup. A content security policy lets only the page's own
    scripts run and forbids every request.
    """
    values = {"facts": facts, "settings": settings, "cards": cards}
    return render_page("report.html.j2", figures, values, explorer)


def render_page(
    template: str, figures: Mapping[str, go.Figure], values: Mapping[str, Any], explorer: Explorer | None = None
) -> str:
    """A template of this folder with its figures and `values`, and with the style and scripts that it needs."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [_plotly_js(), _read("report.js"), *([explorer_script()] if explorer else [])]
    return environment.get_template(template).render(
        figures={name: Markup(figure.to_json()) for name, figure in figures.items()},  # plotly escapes <, > and /
        heights={name: figure.layout.height for name, figure in figures.items()},
        explorer=Markup(explorer.fragment()) if explorer else "",
        style=Markup(_read("report.css")),
        scripts=[Markup(script) for script in scripts],
        script_hashes=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
        **values,
    )


@cache
def _plotly_js() -> str:
    return str(get_plotlyjs()).replace("\r\n", "\n")  # browsers hash the text after this normalisation


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8").strip()


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
