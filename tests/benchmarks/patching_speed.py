"""How long a full layer x position sweep takes: ours, and TransformerLens' on the same model and prompts.

    python tests/benchmarks/patching_speed.py [--model NAME] [--rounds 7] [--threads 1]

TransformerLens runs twice: its own bridge over transformers' model, and its `patching` functions on our model. All
runs are interleaved in one process; printed are medians of wall time and the median of the ratios round by round.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench import load_model
from workbench.experiments.metrics import logit_difference
from workbench.experiments.pairs import Pairs
from workbench.experiments.patching import patch
from workbench.models import Llama

COUNTRIES = ("Japan", "France", "Germany", "Italy", "Spain", "Egypt", "Korea", "Canada")
TEMPLATES = ("The capital of {} is", "People often ask us for the name of the capital of {}. The capital of {} is")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano-moe-thinking")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "transformer_lens"))
    print(f"{arguments.model}, float32, {platform.machine()} CPU, {arguments.threads} thread(s), {packages}")
    for template in TEMPLATES:
        compare(arguments.model, template, arguments.rounds)


@torch.no_grad()
def compare(name: str, template: str, rounds: int) -> dict[str, float]:
    """Time the three sweeps in turn; returns the median ratio of each to ours."""
    model = load_model(name, dtype="float32", progress=False)
    clean, corrupt, correct, wrong = prompts(model, template)
    runs = sweeps(model, clean, corrupt, correct, wrong)
    ours, *others = (run() for run in runs.values())  # warm, and equal?
    for other, label in zip(others, list(runs)[1:], strict=True):
        difference = float((ours - other).abs().max())
        assert difference < 2e-3, f"{label} differs by {difference}"  # of logits of size 10, in another order of sums
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[label].append(time.perf_counter() - start)
    n_layers, n_pos = ours.shape
    print(f"{n_layers} layers x {n_pos} positions, {len(clean)} pairs; median of {rounds} interleaved rounds")
    ratios = {}
    for label, times in seconds.items():
        ratios[label] = statistics.median(t / mine for t, mine in zip(times, seconds["ours"], strict=True))
        print(f"  {label:32} {statistics.median(times):7.3f} s   {ratios[label]:5.2f} x ours")
    return ratios


def prompts(model: Llama, template: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean and corrupt tokens [pair pos] that differ in the country, and their capitals' ids [pair]."""
    tokenizer = model.tokenizer
    rows = [[tokenizer.bos_id, *tokenizer.encode_literal(template.replace("{}", name))] for name in COUNTRIES]
    clean = torch.tensor(rows)
    answers = model(clean)[:, -1].argmax(-1)
    return clean, clean.roll(1, 0), answers, answers.roll(1, 0)


def sweeps(
    model: Llama, clean: Tensor, corrupt: Tensor, correct: Tensor, wrong: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """The same sweep of resid_pre three ways, each giving the mean metric [layer pos]; caches are part of the work."""
    from transformer_lens import patching

    patching.tqdm = lambda items, **_: items  # no bars between the lines
    from workbench.interop.transformer_lens import as_bridge

    metric = logit_difference(correct, wrong)
    pairs = Pairs(clean, corrupt)

    def ours() -> Tensor:
        frame = patch(model, pairs, metric, progress=False).frame
        return torch.tensor(frame["value"].to_numpy()).view(model.cfg.n_layers, clean.shape[1], -1).mean(-1)

    def theirs(lens: Any) -> Tensor:
        cache = lens.run_with_cache(clean, names_filter=lambda name: name.endswith("hook_resid_pre"))[1]
        return patching.get_act_patch_resid_pre(lens, corrupt, cache, lambda logits: metric(logits).mean())

    bridge = boot_bridge(model)
    on_ours = as_bridge(model)
    return {
        "ours": ours,
        "TransformerLens, its own bridge": lambda: theirs(bridge),
        "TransformerLens, on our model": lambda: theirs(on_ours),
    }


def boot_bridge(model: Llama) -> Any:
    """TransformerLens' bridge over transformers' model of the same weights."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    from workbench import save_model

    with tempfile.TemporaryDirectory() as folder:
        path = save_model(model, Path(folder) / "model")
        hf_model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return TransformerBridge.boot_transformers(
            str(path), hf_model=hf_model, device="cpu", dtype=torch.float32
        ).eval()


if __name__ == "__main__":
    main()
