"""One expert layer: correctness at the shape that is timed, then every contestant, need, intervention and format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measure import Ceilings, Report, graphed, medians, relative
from registry import GATHERS, PEERS, WAITS, Layer, Run, Shape, inputs, interventions, needs, ours
from torch import Tensor

from workbench_kernels import Intervene, fused_moe
from workbench_kernels.moe.reference import reference_moe

N_LAYERS = 4  # weights are rotated over so many layers, so that caches do not hold what a model would have to read


class Bench:
    """Layers, device and dtype of one series of measurements."""

    def __init__(self, report: Report, shape: Shape, dtype: torch.dtype, device: torch.device, impl: str) -> None:
        self.report, self.shape, self.dtype, self.device, self.impl = report, shape, dtype, device, impl
        self.layers = [Layer.random(shape, dtype, device, seed) for seed in range(N_LAYERS)]
        self.ceilings = Ceilings.measure(dtype, device, small=shape.d_model < 128)
        for name, value in vars(self.ceilings).items():
            report.add("ceiling", name, dtype=str(dtype), value=value)

    def times(
        self, section: str, factories: dict[str, Callable[[Layer], Run]], x: Tensor, skewed: bool, **values: Any
    ) -> dict[str, float]:
        """Seconds per layer of each contestant that can run; the others become rows that say why."""
        layers = [layer.skewed() for layer in self.layers] if skewed else self.layers
        runs, how = {}, {}
        for name, factory in factories.items():
            made = self.report.attempt(
                section, name, lambda f=factory: self._sequence([f(at) for at in layers], x), **values
            )
            if made is None:
                continue
            replay = None
            if self.device.type == "cuda" and name not in WAITS:
                replay = self.report.attempt(
                    section, f"{name}, graph", lambda m=made: graphed(m, self.device), **values
                )
            tried = replay or made
            if self.report.attempt(section, name, lambda t=tried: (t(), True), **values):
                runs[name], how[name] = tried, "graph" if replay else "eager"
        measured = medians(runs, self.device, budget_s=min(10.0, max(1.0, self.report.left / 20))) if runs else {}
        self.how = how
        return {name: seconds / N_LAYERS for name, seconds in measured.items()}

    @staticmethod
    def _sequence(runs: list[Run], x: Tensor) -> Callable[[], None]:
        def sequence() -> None:
            for run in runs:
                run(x)

        return sequence

    def floor(self, x: Tensor, skewed: bool, weight_bytes: float) -> float:
        """The floor for the routing that really happens, mean over the layers."""
        layers = [layer.skewed() for layer in self.layers] if skewed else self.layers
        hit = [
            fused_moe(x, layer.router, layer.gate_up, layer.down, self.shape.k, impl=self.impl)[1].expert_load > 0
            for layer in layers
        ]
        n_hit = sum(float(each.sum()) for each in hit) / len(hit)
        return self.ceilings.floor(self.shape, x.shape[0], n_hit, weight_bytes, x.element_size())

    def against(self, floor: float, seconds: float) -> dict[str, float]:
        """Columns about the floor; none on a CPU, whose bfloat16 product in torch is slower than ours: no ceiling."""
        on_gpu = self.device.type == "cuda"
        return {"floor_us": floor * 1e6, "percent_of_floor": 100 * floor / seconds} if on_gpu else {}

    def compare(self, n_tokens: int, skewed: bool) -> None:
        """Ours and every peer at one T."""
        x = inputs(self.shape, n_tokens, self.dtype, self.device, seed=n_tokens, skewed=skewed)
        case = {"n_tokens": n_tokens, "routing": "skewed" if skewed else "uniform", "dtype": str(self.dtype)}
        peers = {name: peer for name, peer in PEERS.items() if n_tokens <= GATHERS.get(name, n_tokens)}
        contestants = {f"ours {self.impl}": lambda layer: ours(layer, self.impl), **peers}
        found = self.times("layer", contestants, x, skewed, **case)
        own, floor = found.get(f"ours {self.impl}"), self.floor(x, skewed, self.dtype.itemsize)
        for name, seconds in found.items():
            self.report.add(
                "layer", name, **case, us=seconds * 1e6, **self.against(floor, seconds),
                ours_is_faster_by=seconds / own if own else None, how=self.how[name],
            )  # fmt: skip

    def costs(self, n_tokens: int) -> None:
        """What each need and each intervention adds to the plain call."""
        x = inputs(self.shape, n_tokens, self.dtype, self.device, seed=1)
        asked = {f"need {name}": {"need": need} for name, need in needs(self.shape, self.device).items()}
        changes = interventions(self.shape, n_tokens, self.dtype, self.device)
        asked |= {f"intervene {name}": {"intervene": change} for name, change in changes.items()}
        contestants = {name: (lambda layer, o=o: ours(layer, self.impl, **o)) for name, o in asked.items()}
        case = {"n_tokens": n_tokens, "routing": "uniform", "dtype": str(self.dtype)}
        found = self.times("cost", contestants, x, False, **case)
        plain = found.get("need routing only")
        for name, seconds in found.items():
            more = 100 * (seconds / plain - 1) if plain else None
            self.report.add("cost", name, **case, us=seconds * 1e6, percent_more=more, how=self.how[name])

    def formats(self, n_tokens: int) -> None:
        """int8 and int4 experts beside plain ones; faster by: than plain, below 1 where they are slower."""
        x = inputs(self.shape, n_tokens, self.dtype, self.device, seed=2)
        small = {bits: [layer.quantised(bits) for layer in self.layers] for bits in (8, 4)}
        contestants: dict[str, Callable[[Layer], Run]] = {"plain": lambda layer: ours(layer, self.impl)}
        for bits, pairs in small.items():
            by_layer = {id(layer): pair for layer, pair in zip(self.layers, pairs, strict=True)}
            contestants[f"int{bits}"] = lambda layer, b=by_layer: ours(layer, self.impl, weights=b[id(layer)])
        case = {"n_tokens": n_tokens, "routing": "uniform", "dtype": str(self.dtype)}
        found = self.times("format", contestants, x, False, **case)
        bytes_per_weight = {"plain": float(self.dtype.itemsize), "int8": 1.0, "int4": 0.53125}
        for name, seconds in found.items():
            floor = self.floor(x, False, bytes_per_weight[name])
            self.report.add(
                "format", name, **case, us=seconds * 1e6, **self.against(floor, seconds),
                ours_is_faster_by=found["plain"] / seconds if "plain" in found else None, how=self.how[name],
            )  # fmt: skip

    def correctness(self, n_tokens: int) -> bool:
        """Every format against the oracle in float64; False when an error is too large.

        The choice of experts is judged by the oracle's logits, the outputs with the same experts forced on the oracle:
        experts whose logits differ by less than rounding may be chosen either way, and would differ in all of y.
        """
        layer, x = self.layers[0], inputs(self.shape, n_tokens, self.dtype, self.device, seed=3)
        right = True
        for name, weights in (("plain", None), *((f"int{bits}", layer.quantised(bits)) for bits in (8, 4))):
            used = weights or (layer.gate_up, layer.down)
            y, routing = fused_moe(x, layer.router, *used, self.shape.k, impl=self.impl)
            forced = Intervene(forced_ids=routing.expert_ids)
            expected, oracle = reference_moe(x, layer.router, *used, self.shape.k, intervene=forced)
            who = " ".join(filter(None, ("ours", routing.impl, routing.path, name)))
            right &= self._judge(who, n_tokens, relative(y, expected), 1e-5 if self.dtype == torch.float32 else 8e-3)
            missed = missed_by(oracle.router_logits, routing.expert_ids)
            right &= self._judge(f"{who}, routing", n_tokens, missed, 1e-4)  # both rank in float32 or better
        return right

    def _judge(self, name: str, n_tokens: int, error: float, bound: float) -> bool:
        note = "ok" if error < bound else f"WRONG: expected below {bound}"
        self.report.add("correctness", name, n_tokens=n_tokens, dtype=str(self.dtype), value=error, note=note)
        return error < bound


def missed_by(logits: Tensor, ids: Tensor) -> float:  # [T, E], [T, K]
    """By how much the least logit among the chosen experts lies below the K-th largest, in the worst token."""
    wanted = logits.topk(ids.shape[1], dim=-1).values[:, -1]  # [T]
    duplicates = (ids.sort(-1).values.diff(dim=-1) == 0).any()
    return float("inf") if duplicates else float((wanted - logits.gather(-1, ids).amin(-1)).max())
