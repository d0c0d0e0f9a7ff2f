"""Which experts carry a language: `python data/nano/evaluate_experts.py [--models DIR] [--top N] [--controls N]`.

Scans every expert of the bundled mixtures on half of the items, judges the most selective sets on the other half
against matched controls, and writes what was found between the markers of docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from recipe import HERE
from tables import write_findings

from workbench.evals.ablate import ablate_by_scan
from workbench.evals.adapter import WorkbenchLM
from workbench.evals.conditions import AblatePlan
from workbench.evals.harness import evaluate
from workbench.evals.report import findings, summary, write_report

GUIDE = HERE.parents[1] / "docs" / "evaluation.md"
TASKS = {"nano-moe-base": "workbench_choices", "nano-moe-thinking": "workbench_reference_low"}


def measure(name: str, args: argparse.Namespace) -> str:
    """Markdown about one model: its scores, the sets judged, what follows."""
    lm = WorkbenchLM(str(args.models / name), progress=False)
    weights = hashlib.sha256((args.models / name / "model.safetensors").read_bytes()).hexdigest()[:12]
    means = evaluate(lm, [TASKS[name]], limit=args.limit).means
    scores = ", ".join(f"{task} {metric} {mean:.3f}" for task, metric, _, _, mean, _ in means.iter_rows())
    parts = [f"### {name}", "", f"Weights {weights}. Without a change: {scores}.", ""]
    for mode in args.modes:
        plan = AblatePlan((TASKS[name],), n_controls=args.controls, limit=args.limit)
        found = ablate_by_scan(lm, plan, args.out / f"{name}-{mode}", args.top, mode, args.layers)
        write_report(found)
        parts += [f"`{mode}`: {summary(found)}", "", *(f"- {line}" for line in findings(found)), ""]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Which experts carry a language.")
    parser.add_argument("--models", type=Path, default=HERE, help="directory that holds the checkpoints")
    parser.add_argument("--only", choices=TASKS, action="append", help="measure these alone")
    parser.add_argument("--top", type=int, default=8, help="experts per set")
    parser.add_argument("--controls", type=int, default=39)
    parser.add_argument("--limit", type=int, help="the first N items of each task")
    parser.add_argument("--layers", type=int, nargs="+", help="scan these alone")
    parser.add_argument("--modes", nargs="+", default=["reroute"], choices=("reroute", "drop"))
    parser.add_argument("--out", type=Path, default=Path("runs/experts"), help="for tables and reports")
    parser.add_argument("--guide", type=Path, default=GUIDE)
    args = parser.parse_args()
    names = args.only or list(TASKS)
    made = [measure(name, args) for name in names]
    write_findings(args.guide, made, " in float32", ("torch", "lm_eval"))


if __name__ == "__main__":
    main()
