"""The whole model with random weights: prefill, and decoding one token per sequence from a filled cache.

Beside it transformers' own model on the same weights, in the same process and in turn, and decoding with int8 experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measure import Ceilings, Report, graphed, medians, relative
from peer_model import transformers_cache, transformers_model

from workbench.config import Qwen3MoeConfig, RopeConfig
from workbench.models import KVCache, build_model
from workbench.models.llama import Llama
from workbench.models.moe_weights import QuantizedWeight
from workbench_kernels.quant import weight_bytes

REAL = Qwen3MoeConfig(
    d_model=2560, n_layers=32, n_heads=40, n_kv_heads=4, d_head=128, d_mlp=7680, d_vocab=196_608, n_ctx=65_536,
    norm_eps=1e-6, rope=RopeConfig(theta=500_000.0), n_experts=128, k=8, d_expert=960, sparse_layers=(True,) * 32,
)  # fmt: skip
SMOKE = Qwen3MoeConfig(
    d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_head=16, d_mlp=96, d_vocab=101, n_ctx=256, norm_eps=1e-6,
    rope=RopeConfig(theta=1e4), n_experts=8, k=2, d_expert=64, sparse_layers=(True,) * 2,
)  # fmt: skip
STD = 0.02
REPS = 7
Step = Callable[[], torch.Tensor]


@torch.no_grad()
def whole_model(
    report: Report, cfg: Qwen3MoeConfig, dtype: torch.dtype, device: torch.device, impl: str,
    prompts: tuple[int, ...], batches: tuple[int, ...], context: int,
) -> None:  # fmt: skip
    """Rows of section "model": time, floor and tokens per second; each stands alone and within the budget."""
    ceilings = Ceilings.measure(dtype, device, small=cfg.d_model < 128)
    reserve = 20.0 if device.type == "cuda" else 0.0
    for experts in ("plain", "int8"):
        common = {"dtype": str(dtype), "routing": "random weights"}
        build = lambda e=experts: ModelBench(report, random_model(cfg, dtype, device, impl, e), ceilings)  # noqa: E731
        bench = report.section("model", f"{experts} weights", build, reserve, **common)
        if bench is None:
            continue
        for batch in batches:
            case = common | {"n_tokens": batch, "note": f"context {context}"}
            report.section("model", "decode", lambda b=batch, c=case, m=bench: m.decode(b, context, c), reserve, **case)
        for n_tokens in prompts if experts == "plain" else ():
            case = common | {"n_tokens": n_tokens}
            report.section("model", "prefill", lambda n=n_tokens, c=case, m=bench: m.prefill(n, c), reserve, **case)
        del bench, case
        if device.type == "cuda":
            torch.cuda.empty_cache()  # room for the next weights


def random_model(
    cfg: Qwen3MoeConfig, dtype: torch.dtype, device: torch.device, impl: str, experts: str = "plain"
) -> Llama:
    """Normal weights; int8 ones uniform, with the same spread."""
    model = build_model(cfg, dtype=dtype, device=device, moe_impl=impl, experts=experts)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter) if parameter.ndim == 1 else torch.nn.init.normal_(parameter, std=STD)
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            module.values.random_(-127, 128)
            module.scales.fill_(STD / (127 / 3**0.5))
    return model


def random_tokens(model: Llama, batch: int, n_pos: int) -> torch.Tensor:  # [batch pos]
    """Tokens of which no two are alike: each sequence of a batch goes to experts of its own."""
    order = torch.randperm(model.cfg.d_vocab, generator=torch.Generator().manual_seed(batch + n_pos))
    return order[: batch * n_pos].view(batch, n_pos).to(model.device)


def random_cache(model: Llama, batch: int, context: int) -> KVCache:
    """Keys and values of `context` positions, as large as projections of normalised streams are, and room for one."""
    cache = model.new_cache(batch, context + 1)
    generator = torch.Generator(model.device).manual_seed(batch)
    for layer in (*cache.keys, *cache.values):
        layer.normal_(generator=generator)
    cache.n_seen = context
    return cache


@dataclass
class ModelBench:
    """One model and its peer on one device."""

    report: Report
    model: Llama
    ceilings: Ceilings

    def __post_init__(self) -> None:
        self.int8 = any(isinstance(module, QuantizedWeight) for module in self.model.modules())
        self.peer: Any = None
        if not self.int8:
            self.peer = self.report.attempt("model", "transformers", lambda: transformers_model(self.model))

    def prefill(self, n_tokens: int, case: dict[str, Any]) -> None:
        """Up to the logits of the last position, as a generation needs them."""
        model, tokens = self.model, random_tokens(self.model, 1, n_tokens)

        def run() -> torch.Tensor:
            stream = model(tokens, stop_at_layer=model.cfg.n_layers)
            return model.unembed(model.ln_final(stream[:, -1:]))

        runs: dict[str, Step] = {"prefill": run}
        if self.peer is not None:
            runs["transformers prefill"] = lambda: self.peer(tokens, use_cache=False, logits_to_keep=1).logits
        n_hit = self.n_hit(tokens, stop_at_layer=model.cfg.n_layers)
        floor = model_floor(self.ceilings, model, 1, n_tokens, 0, n_hit)
        self._rows(runs, "prefill", floor, n_tokens, dict.fromkeys(runs, "eager"), case)

    def decode(self, batch: int, context: int, case: dict[str, Any]) -> None:
        """One step after `context` positions, the same step again and again."""
        model, tokens, cache = self.model, random_tokens(self.model, batch, 1), random_cache(self.model, batch, context)

        def step() -> torch.Tensor:
            cache.n_seen = context
            return model(tokens, cache=cache)

        name = "decode int8" if self.int8 else "decode"
        runs: dict[str, Step] = {f"{name}, eager": step}
        how = {f"{name}, eager": "eager", f"{name}, graph": "graph", "transformers decode": "eager"}
        if model.device.type == "cuda":
            graph = self.report.attempt("model", f"{name}, graph", lambda: graphed(step, model.device), **case)
            runs |= {f"{name}, graph": graph} if graph else {}
        if self.peer is not None:
            runs["transformers decode"] = self._peer_step(tokens, cache, context)
        n_hit = self.n_hit(tokens, cache=random_cache(model, batch, context))
        floor = model_floor(self.ceilings, model, batch, 1, context, n_hit)
        self._rows(runs, f"{name}, eager", floor, batch, how, case)

    def _peer_step(self, tokens: torch.Tensor, cache: KVCache, context: int) -> Step:
        past = transformers_cache(cache, context)

        def step() -> torch.Tensor:
            logits = self.peer(tokens, past_key_values=past, use_cache=True).logits
            past.crop(-1)
            return logits

        return step

    def n_hit(self, tokens: torch.Tensor, **options: Any) -> int:
        """Experts that these tokens go to, summed over the layers."""
        hit: list[torch.Tensor] = []

        def count(load: torch.Tensor, hook: Any) -> None:
            hit.append((load > 0).sum())

        loads = lambda name: name.endswith("hook_expert_load")  # noqa: E731
        self.model.run_with_hooks(tokens, fwd_hooks=[(loads, count)], **options)
        return int(torch.stack(hit).sum())

    def _rows(
        self, runs: dict[str, Step], base: str, floor: float, n_tokens: int, how: dict[str, str], case: dict[str, Any]
    ) -> None:
        """One row per contestant that runs and can be afforded; peers are compared with `base`, which is eager too."""
        logits = {name: self._tried(name, run, case) for name, run in runs.items()}
        runs = {name: run for name, run in runs.items() if logits[name] is not None}
        found = medians(runs, self.model.device, reps=REPS)
        for name, seconds in found.items():
            values: dict[str, Any] = {}
            if name != base and base in found:
                values["ours_is_faster_by"] = seconds / found[base] if name.startswith("transformers") else None
            if name.startswith("transformers") and base in found:
                off = relative(logits[name][:, -1], logits[base][:, -1])
                values["note"] = f"{case.get('note', '')} logits differ by {off:.1e}".strip()
            self.report.add(
                "model", name, **case | values, us=seconds * 1e6, floor_us=floor * 1e6,
                percent_of_floor=100 * floor / seconds, tokens_per_s=n_tokens / seconds, how=how[name],
            )  # fmt: skip

    def _tried(self, name: str, run: Step, case: dict[str, Any]) -> Any:
        """The first result; None where there is none, or where measuring would take more than half of what is left."""
        logits = self.report.attempt("model", name, lambda: result_of(name, run), **case)
        if logits is None:
            return None
        began = time.monotonic()
        float(run().flatten()[0]) if not name.endswith("graph") else run()  # reading waits for the device
        if (time.monotonic() - began) * (REPS + 1) > max(self.report.left, 0.0) / 2:
            self.report.add("model", name, **case | {"note": "left out: it would take more than half of the time left"})
            return None
        return logits


def result_of(name: str, run: Step) -> Any:
    """A copy of what `run` gives; a graph's replay gives nothing, and True stands for that it ran."""
    result = run()
    return True if name.endswith("graph") else result.clone()


def model_floor(ceilings: Ceilings, model: Llama, batch: int, n_new: int, n_past: int, n_hit: int) -> float:
    """Seconds at least: every weight that is needed read once and the cache read; or the arithmetic, the longer one.

    Logits are those of the last position; attention counts the pairs that a causal mask leaves.
    """
    cfg = model.cfg
    assert isinstance(cfg, Qwen3MoeConfig)
    item, n_tokens, unembed = model.dtype.itemsize, batch * n_new, cfg.d_vocab * cfg.d_model
    per_expert = 3 * cfg.d_model * cfg.d_expert
    shared = cfg.n_params - sum(cfg.sparse_layers) * cfg.n_experts * per_expert
    shared -= 0 if cfg.tie_embeddings else cfg.n_embedding_params  # of which only the tokens' rows are read
    cached = 2 * cfg.n_layers * batch * (n_past + n_new) * cfg.n_kv_heads * cfg.d_head
    n_bytes = (shared + n_tokens * cfg.d_model + cached) * item + n_hit * expert_bytes(model)
    pairs = batch * (n_new * n_past + n_new * (n_new + 1) / 2)
    act = shared - unembed + sum(cfg.sparse_layers) * cfg.k * per_expert
    flop = 2 * (n_tokens * act + batch * unembed) + 4 * cfg.n_layers * cfg.n_heads * cfg.d_head * pairs
    return max(n_bytes / ceilings.bytes_per_s, flop / ceilings.flop_per_s)


def expert_bytes(model: Llama) -> int:
    """Bytes of one expert as it is stored."""
    cfg = model.cfg
    assert isinstance(cfg, Qwen3MoeConfig)
    if any(isinstance(module, QuantizedWeight) for module in model.modules()):
        return sum(
            weight_bytes(shape, 8) for shape in ((1, 2 * cfg.d_expert, cfg.d_model), (1, cfg.d_model, cfg.d_expert))
        )
    return 3 * cfg.d_model * cfg.d_expert * model.dtype.itemsize
