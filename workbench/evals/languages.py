"""In which language an item is, and what it shares with others, for any task of the harness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workbench.axes import LANGUAGES


def item_language(doc: Mapping[str, Any], task: str) -> str | None:
    """The item's field `lang`; else a part "ja", "en" or "japanese" of its task's name; else None."""
    if doc.get("lang") in LANGUAGES:
        return str(doc["lang"])
    parts = task.lower().replace("-", "_").split("_")
    found = {"ja" if part in ("jp", "japanese") else part for part in parts} & set(LANGUAGES)
    return found.pop() if len(found) == 1 else None


def item_group(doc: Mapping[str, Any], task: str, doc_id: int) -> str:
    """The item's field `group`, which items that share a fact have in common; else itself alone."""
    return str(doc["group"]) if isinstance(doc.get("group"), str) else f"{task}/{doc_id}"
