"""The routing explorer: text beside a layer x expert map, in one piece of HTML without network or kernel.

    workbench.explore(run)                   # shows itself as the value of a notebook cell
    workbench.explore(run).to_html("a.html") # a page of its own
    workbench.explore(run).widget()          # the same, with the selection in Python (extra `notebooks`)

The data travel as JSON that no browser executes; one constant script draws every explorer of a page. Where scripts are
blocked the texts stay, each token with its experts as a tooltip.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl

from workbench.errors import RunError
from workbench.plots.explorer_data import (
    QUANTITIES,
    ROUTING_COLUMNS,
    TOKEN_COLUMNS,
    choose_docs,
    order_docs,
    pack,
)

_HERE = Path(__file__).parent
_SCRIPTS = tuple(f"explorer{part}.js" for part in ("_data", "_map", "_text", "_bar", "_colours", ""))
Frame = pl.DataFrame | pl.LazyFrame


def explore(
    run: Any,
    routing: Frame | None = None,
    *,
    docs: Sequence[str] | None = None,
    group: str | None = None,
    compare: bool = False,
    n_experts: int | None = None,
    quantities: Sequence[str] | None = None,
    max_tokens: int = 8_000,
) -> Explorer:
    """Look at the routing of a few documents token by token.

    Args:
        run: a `Run` (anything with `tokens`, `routing` and `n_experts`), or its tokens frame followed by `routing`.
        docs: ids of the documents to show, the first one on top. Default: those of one group.
        group: the group whose documents (both languages, every effort) to show. Default: one of median size.
        compare: open with the second document beside the first one.
        n_experts: of one layer; needed with frames, which do not hold it.
        quantities: numeric columns of `routing` that may colour the tokens. Default: router entropy and margin, where
            they exist.
        max_tokens: more are refused, as everything shown travels inside the page: 2 bytes for each token, layer and
            slot, which is about 0.8 kB per token at 32 layers and 8 experts per token.

    Raises RunError for unknown documents, groups or columns and for too many tokens; ShapeError when tokens and routing
    do not belong together.
    """
    tokens, routes, n_experts = _frames(run, routing, n_experts)
    text = _collect(tokens, TOKEN_COLUMNS, "tokens")
    chosen = _chosen(text, docs, group, max_tokens)
    text = text.filter(pl.col("doc_id").is_in(chosen))
    if len(text) > max_tokens:
        raise RunError(
            f"documents: expected at most {max_tokens:,} tokens in one explorer, got {len(text):,}. "
            "Pass docs=[...] with fewer of them, or a larger max_tokens."
        )
    names = routes.collect_schema().names()
    wanted = [name for name in QUANTITIES if name in names] if quantities is None else list(quantities)
    part = _collect(routes.filter(pl.col("doc_id").is_in(chosen)), (*ROUTING_COLUMNS, *wanted), "routing")
    return Explorer(pack(text, part, chosen, n_experts, wanted) | {"compare": compare and len(chosen) > 1})


class Explorer:
    """A routing explorer over a few documents; a notebook shows it by itself. `payload` is its data, JSON-ready."""

    def __init__(self, payload: dict[str, Any]) -> None:
        self.payload = payload

    def fragment(self) -> str:
        """HTML for a place in any page, without executable script: that page also holds `explorer_script()`, once.

        Under a content security policy the script is allowed by its hash, and styles need 'unsafe-inline'.
        """
        data = _json(self.payload)
        return (
            f"<style>{_read('explorer.css')}</style>\n"
            f'<div class="wbx" data-workbench-explorer="{self.payload["format"]}">\n{self._fallback()}'
            f'<script type="application/json">{data}</script>\n</div>'
        )

    def to_html(self, path: str | Path) -> Path:
        """Write a page of its own, which opens offline; returns its path. Raises RunError when it cannot be written."""
        path, script = Path(path), explorer_script()
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'"
        page = (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<title>Routing explorer</title>\n'
            "<style>body { margin: 0; color-scheme: light dark; background: light-dark(#ffffff, #14171b) }</style>\n"
            "</head>\n<body>\n"
            f"{self.fragment()}\n<script>{script}</script>\n</body>\n</html>\n"
        )
        try:
            path.write_text(page, encoding="utf-8")
        except OSError as error:
            raise RunError(f"{path}: expected a place to write, got {error.strerror}. Pass another path.") from None
        return path

    def widget(self) -> Any:
        """The explorer as an anywidget: `widget.selection` holds doc_id, pos, layer and expert of what is chosen.

        Raises RunError when anywidget (extra `notebooks`) is not installed.
        """
        from workbench.plots.explorer_widget import explorer_widget

        return explorer_widget(self.payload)

    def _repr_html_(self) -> str:
        return f"{self.fragment()}\n<script>{explorer_script()}</script>"

    def __repr__(self) -> str:
        shown, n_tokens = self.payload["docs"], sum(len(doc["tokens"]) for doc in self.payload["docs"])
        return (
            f"Explorer({len(shown)} documents, {n_tokens:,} tokens, {len(self.payload['layers'])} layers, "
            f"{self.payload['n_experts']} experts, k={self.payload['k']})"
        )

    def _fallback(self) -> str:
        """What is seen where scripts do not run: every text, each token with its strongest experts as a tooltip."""
        note = "This view needs scripts: trust the notebook, or open the page in a browser. Point at a token for its "
        parts = [f"<p><em>{note}strongest expert in each layer.</em></p>"]
        for doc in self.payload["docs"]:
            spans = "".join(
                f'<span title="{html.escape(hint)}">{html.escape(text)}</span>'
                for text, hint in _hints(doc, self.payload)
            )
            parts.append(f'<p><strong>{html.escape(doc["label"])}</strong></p>\n<p class="wbx-plain">{spans}</p>')
        return '<div class="wbx-fallback">' + "\n".join(parts) + "</div>\n"


@cache
def explorer_script() -> str:
    """The script that draws every explorer of a page; constant, so that one hash in a policy allows it."""
    return '(() => {\n"use strict";\n' + _source() + "\nmountAll();\n})();"


@cache
def explorer_module() -> tuple[str, str]:
    """(ES module exporting `mount`, style sheet), for a host that mounts explorers itself."""
    return _source() + "\nexport { mount };\n", _read("explorer.css")


def _frames(run: Any, routing: Frame | None, n_experts: int | None) -> tuple[pl.LazyFrame, pl.LazyFrame, int]:
    if routing is None:
        if not (hasattr(run, "tokens") and hasattr(run, "routing")):
            raise RunError(
                f"run: expected a run or two frames, got {type(run).__name__}. "
                "Pass workbench.Run.open(path), or tokens, routing and n_experts=."
            )
        run, routing, n_experts = run.tokens, run.routing, n_experts or run.n_experts
    if not isinstance(run, Frame) or not isinstance(routing, Frame):
        raise RunError(f"tokens, routing: expected polars frames, got {type(run).__name__}, {type(routing).__name__}.")
    if not n_experts or not 0 < n_experts <= 65536:
        raise RunError(f"n_experts: expected 1 to 65536 beside frames, got {n_experts}. Pass n_experts=.")
    return run.lazy(), routing.lazy(), n_experts


def _collect(frame: pl.LazyFrame, columns: Sequence[str], name: str) -> pl.DataFrame:
    missing = [column for column in columns if column not in frame.collect_schema().names()]
    if missing:
        raise RunError(f"{name}: expected a column {missing[0]!r}, got none. Pass the frames of a run.")
    return frame.select(columns).collect()


def _chosen(tokens: pl.DataFrame, docs: Sequence[str] | None, group: str | None, max_tokens: int) -> list[str]:
    if docs is not None and group is not None:
        raise RunError("docs, group: expected one of them, got both. Pass docs=[...] alone.")
    if docs is not None:
        chosen = [docs] if isinstance(docs, str) else list(dict.fromkeys(docs))
        unknown = sorted(set(chosen) - set(tokens["doc_id"]))
        if unknown or not chosen:
            got = unknown or "none"
            raise RunError(f"docs: expected ids of documents of the run, got {got}. See tokens['doc_id'].")
        return chosen
    if group is None:
        return choose_docs(tokens, max_tokens)
    members = tokens.filter(pl.col("group_id") == group)
    if members.is_empty():
        raise RunError(f"group: expected a group of the run, got {group!r}. See tokens['group_id'].")
    return order_docs(members)


def _hints(doc: dict[str, Any], payload: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(text, tooltip) of every token."""
    size = 1 if payload["n_experts"] <= 256 else 2
    ids, n_layers, k = base64.b64decode(doc["ids"]), len(payload["layers"]), payload["k"]
    labels = [name for name, _, count in doc["runs"] for _ in range(count)]
    for place, (text, token_id, segment) in enumerate(zip(doc["tokens"], doc["token_ids"], labels, strict=True)):
        starts = ((place * n_layers + layer) * k * size for layer in range(n_layers))
        strongest = " ".join(str(int.from_bytes(ids[start : start + size], "little")) for start in starts)
        layers = f"layers {payload['layers'][0]} to {payload['layers'][-1]}"
        yield text, f"id {token_id}, {segment}; {layers}: {strongest}"


def _json(payload: dict[str, Any]) -> str:
    """JSON in ASCII that no HTML parser can mistake for markup."""
    text = json.dumps(payload, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _source() -> str:
    return "\n".join(map(_read, _SCRIPTS))


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8").strip()
