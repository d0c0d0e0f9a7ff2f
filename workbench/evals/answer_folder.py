"""What the answers in a folder came from, so that none bears another model's name.

A folder holds answers of one model under one change, whose name `metadata.json` gives to the judge. `export.json` has
for each benchmark the hash of the weights, the changes, how it was asked, and the hash of its items.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import RunError
from workbench.evals.targets import plain
from workbench.experiments.identity import describe_model
from workbench.interventions import Intervention
from workbench.io.run_files import check_same, write_text
from workbench.models import Llama

if TYPE_CHECKING:
    from workbench.evals.judge import Asking

Row = dict[str, Any]


class AnswerFolder:
    """The folder, and what is asked of it now. Raises RunError for an `export.json` that cannot be read."""

    def __init__(self, folder: Path, name: str, model: Llama, interventions: Sequence[Intervention]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.metadata, self._path = folder, folder / "metadata.json", folder / "export.json"
        found = describe_model(model)
        # where the weights lie and on what device they run is no part of what was answered
        weights = {name: value for name, value in found["model"].items() if name != "source"}
        runs = {name: value for name, value in found["runs"].items() if name != "device"}
        self._same = {
            "name": name, "model": weights, "runs": runs, "attached": found["interventions"],
            "changes": plain(interventions),
        }  # fmt: skip
        self._held: dict[str, Any] = self._read()

    @property
    def date(self) -> str | None:
        """The day of the conversations that are there, which the same command would not know a day later."""
        return next((held["asked"]["date"] for held in self._held.values()), None)

    def file(self, benchmark: str) -> Path:
        return self.folder / f"{benchmark}.jsonl"

    def holds(self, benchmark: str) -> bool:
        return self.file(benchmark).exists()

    def check(self, benchmark: str, rows: Sequence[Row], asking: Asking, limit: int | None) -> None:
        """Raises RunError unless the answers that are there are those that are asked for."""
        self._need(benchmark)
        check_same(self.folder, self._held[benchmark], self._of(rows, asking, limit))

    def check_others(self, replaced: Sequence[str]) -> None:
        """Raises RunError when answers that stay came from another model or change, whose name they would bear."""
        for file in sorted(self.folder.glob("*.jsonl")):
            if file.stem not in replaced:
                self._need(file.stem)
                check_same(self.folder, self._held[file.stem], self._same, f"{file.stem}.")

    def begin(self, benchmarks: Sequence[str]) -> None:
        """The name first, and nothing under it that is about to be replaced: whatever stops the run, none is wrong."""
        for benchmark in benchmarks:
            self._held.pop(benchmark, None)
        self._save()
        for benchmark in benchmarks:
            self.file(benchmark).unlink(missing_ok=True)
        write_text(self.metadata, json.dumps({"model_name": self._same["name"]}, ensure_ascii=False))

    def write(
        self, benchmark: str, rows: Sequence[Row], answered: Sequence[Row], asking: Asking, limit: int | None
    ) -> None:
        self._held[benchmark] = self._of(rows, asking, limit)
        self._save()
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answered)
        write_text(self.file(benchmark), text)

    def _of(self, rows: Sequence[Row], asking: Asking, limit: int | None) -> dict[str, Any]:
        asked = {name: value for name, value in asdict(asking).items() if name != "batch_size"}  # changes no answer
        text = json.dumps(rows, ensure_ascii=False, sort_keys=True)
        items = hashlib.sha256(text.encode()).hexdigest()[:16]
        return {**self._same, "asked": asked, "limit": limit, "items": items}

    def _need(self, benchmark: str) -> None:
        if benchmark not in self._held:
            raise RunError(
                f"{self.folder}: expected answers to {benchmark} that export.json tells of, got others. "
                "Name another folder, or overwrite them."
            )

    def _save(self) -> None:
        write_text(self._path, json.dumps(self._held, ensure_ascii=False, indent=1) + "\n")

    def _read(self) -> dict[str, Any]:
        if not self._path.is_file():
            return {}
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        entries = list(found.values()) if isinstance(found, dict) else [None]
        if not all(isinstance(held, dict) and "asked" in held for held in entries):
            raise RunError(f"{self._path}: expected what an export wrote, got something else. Name another folder.")
        return dict(found or {})
