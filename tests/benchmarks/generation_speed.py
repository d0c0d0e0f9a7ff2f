"""Generation here and in transformers, TransformerLens and nnsight: CPU time per token, interleaved in one process.

    python tests/benchmarks/generation_speed.py [--models nano-moe-thinking mid-dense ...] [--runs 7]

Greedy, float32, one thread, the same prompts, no stop ids, and every run must write the same tokens. Plain generation
is compared with transformers' `generate` under both of its caches, the faster of which counts. With capture, all
record router logits (dense: the residual stream) of every layer at every token. Every turn has another order, since a
run pays for what the one before left behind. Times are medians of CPU time, ratios medians of the turns' ratios.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.io.hub import BUNDLED_DIR
from workbench.io.saving import save_model
from workbench.io.weights import load_model
from workbench.models import Llama, build_model, init_weights

Run = Callable[[], Tensor]
MODELS = ["nano-moe-thinking", "nano-dense-thinking", "mid-moe", "mid-dense"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--new", type=int, default=64, help="tokens to write")
    parser.add_argument("--no-lens", action="store_true", help="leave TransformerLens and nnsight out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            path = mid_size(name, Path(folder) / name) if name.startswith("mid-") else BUNDLED_DIR / name
            compare(name, path, arguments)


def mid_size(name: str, path: Path) -> Path:
    """A random checkpoint with the nano vocabulary: "mid-dense" has 230 million parameters, "mid-moe" 210.

    The mixture routes as the 32B-A3B model does, 8 of 128 experts per token.
    """
    nano = load_model(f"nano-{name.removeprefix('mid-')}-base", dtype="float32").cfg
    if name == "mid-dense":
        cfg = replace(nano, d_model=1024, n_layers=20, n_heads=16, n_kv_heads=4, d_head=64, d_mlp=2816)
    else:
        cfg = replace(
            nano, d_model=512, n_layers=8, n_heads=8, n_kv_heads=2, d_head=64, n_experts=128, k=8, d_expert=128,
            d_mlp=512, sparse_layers=(True,) * 8,
        )  # fmt: skip
    return save_model(init_weights(build_model(cfg), seed=0, std=0.05), path)


def compare(name: str, path: Path, arguments: Any) -> None:
    model = load_model(path, dtype="float32")
    tokens = torch.randint(400, 2000, (arguments.batch, 32), generator=torch.Generator().manual_seed(0))
    plain = plain_runs(model, path, tokens, arguments.new)
    print(f"{name}: {model.cfg.n_params / 1e6:.1f} million parameters, {arguments.batch} x 32 + {arguments.new} tokens")
    report(measure(plain, arguments.runs), "ours, growing cache")
    if not arguments.no_lens:
        report(measure(capture_runs(model, path, tokens, arguments.new), arguments.runs), "ours, capture")


def plain_runs(model: Llama, path: Path, tokens: Tensor, n_new: int) -> dict[str, Run]:
    record = ["routing"] if model.cfg.is_moe else ["resid_post"]
    options = {"max_new_tokens": n_new, "stop_ids": ()}
    hf_model = hf(path)
    return {
        "ours, growing cache": lambda: model.generate(tokens, **options).tokens,
        "ours, static cache": lambda: model.generate(tokens, cache="static", **options).tokens,
        f"ours, recording {record[0]}": lambda: model.generate(tokens, record=record, **options).tokens,
        "transformers, dynamic cache": lambda: hf_generate(hf_model, tokens, n_new),
        "transformers, static cache": lambda: hf_generate(
            hf_model, tokens, n_new, cache_implementation="static", disable_compile=True
        ),
    }


def capture_runs(model: Llama, path: Path, tokens: Tensor, n_new: int) -> dict[str, Run]:
    leaf = "router_logits" if model.cfg.is_moe else "resid_post"
    return {
        "ours, capture": lambda: model.generate(tokens, max_new_tokens=n_new, stop_ids=(), record=[leaf]).tokens,
        "TransformerLens, capture": lens_run(path, tokens, n_new, model.cfg.is_moe),
        "nnsight, capture": nnsight_run(path, tokens, n_new, model.cfg.is_moe, model.cfg.n_layers),
    }


def hf(path: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def hf_generate(hf_model: Any, tokens: Tensor, n_new: int, **cache: Any) -> Tensor:
    return hf_model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=n_new, min_new_tokens=n_new,
        eos_token_id=None, pad_token_id=4, **cache,
    )  # fmt: skip


def lens_run(path: Path, tokens: Tensor, n_new: int, is_moe: bool) -> Run:
    """TransformerLens' bridge, with hooks that keep what they see."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_DIR / "nano-moe-base")
    bridge = TransformerBridge.boot_transformers(
        str(path), hf_model=hf(path), tokenizer=tokenizer, device="cpu", dtype=torch.float32
    )
    end = ".mlp.gate.hook_out" if is_moe else ".hook_out"
    names = [
        name for name in bridge.hook_dict
        if name.endswith(end) and (is_moe or (name.startswith("blocks.") and name.count(".") == 2))
    ]  # fmt: skip
    if not names:
        raise RuntimeError(f"TransformerLens: no hook ends in {end}")

    def run() -> Tensor:
        kept: list[Any] = []
        with torch.no_grad(), bridge.hooks(fwd_hooks=[(name, lambda x, hook: kept.append(x)) for name in names]):
            return bridge.generate(
                tokens, max_new_tokens=n_new, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False
            )

    return run


def nnsight_run(path: Path, tokens: Tensor, n_new: int, is_moe: bool, n_layers: int) -> Run:
    """nnsight's generation, which saves a module's output at every step."""
    from nnsight import LanguageModel
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_DIR / "nano-moe-base")
    traced = LanguageModel(hf(path), tokenizer=tokenizer)
    options = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False, "eos_token_id": None}

    def run() -> Tensor:
        with torch.no_grad(), traced.generate(tokens, pad_token_id=4, **options) as tracer:
            modules = [traced.model.layers[i].mlp.gate if is_moe else traced.model.layers[i] for i in range(n_layers)]
            cache = tracer.cache(modules=modules)  # noqa: F841
            out = tracer.result.save()
        return out

    return run


def measure(runs: dict[str, Run], n: int) -> dict[str, list[float]]:
    expected, times = None, {name: [] for name in runs}  # type: ignore[var-annotated]
    shuffled = random.Random(0)
    for turn in range(n + 1):  # the first warms up
        for name, run in shuffled.sample(list(runs.items()), len(runs)):
            gc.collect()
            start = time.process_time()
            written = run()
            times[name].append(time.process_time() - start)
            expected = written if expected is None else expected
            if turn == 0 and not torch.equal(written.cpu(), expected.cpu()):
                sys.exit(f"{name}: expected the tokens of every other run, got others")
    return {name: spent[1:] for name, spent in times.items()}


def report(times: dict[str, list[float]], base: str) -> None:
    for name, spent in times.items():
        ratio = statistics.median(one / other for one, other in zip(spent, times[base], strict=True))
        print(f"  {name:<30} {statistics.median(spent) * 1e3:>9.1f} ms  {ratio:>6.3f} x", flush=True)


if __name__ == "__main__":
    main()
