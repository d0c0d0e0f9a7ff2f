"""Measure the nano models: `python data/nano/evaluate.py [--models DIR] [--only NAME] [--json FILE] [--readme FILE]`.

Writes every figure to a JSON file and, as tables, between the markers of data/README.md. Takes some minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from measure_answers import chat_figures, completion_figures
from measure_loss import baseline_losses, model_losses
from measure_routing import routing_figures
from recipe import HERE, RECIPES, TOKENIZER, Recipe
from tables import insert

from workbench import load_model
from workbench.io.tokens import Tokenizer
from workbench.models import Qwen3Moe

SIGNIFICANT = 4


def measure(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """All figures of one checkpoint."""
    model = load_model(str(directory), dtype="float32", progress=False)
    weights = (directory / "model.safetensors").read_bytes()
    found: dict[str, Any] = {"sha256": hashlib.sha256(weights).hexdigest(), "parameters": model.cfg.n_params}
    found["loss"] = model_losses(model)
    if recipe.is_thinking:
        found["chat"] = chat_figures(model)
    else:
        found["completion"] = completion_figures(model)
    if isinstance(model, Qwen3Moe):
        found["routing"] = routing_figures(model)
    return found


def rounded(value: Any) -> Any:
    """Nested figures with floats cut to the digits worth keeping."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, SIGNIFICANT) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the nano models.")
    parser.add_argument("--models", type=Path, default=HERE, help="directory that holds the checkpoints")
    parser.add_argument("--only", choices=RECIPES, action="append", help="measure these alone")
    parser.add_argument("--json", type=Path, default=HERE / "evaluation.json")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {"models": {}}
    if args.only and args.json.is_file():  # the other models' figures stay
        figures = json.loads(args.json.read_text("utf-8"))
    for name in args.only or RECIPES:
        started = time.monotonic()
        figures["models"][name] = rounded(measure(RECIPES[name], args.models / name))
        print(f"{name}: measured in {time.monotonic() - started:.0f} s", flush=True)
    seed = next(iter(RECIPES.values())).seed
    figures["baselines"] = rounded(baseline_losses(Tokenizer.from_file(TOKENIZER), seed))
    figures["models"] = {name: figures["models"][name] for name in RECIPES if name in figures["models"]}
    args.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", "utf-8")
    args.readme.write_text(insert(args.readme.read_text("utf-8"), figures), "utf-8")


if __name__ == "__main__":
    main()
