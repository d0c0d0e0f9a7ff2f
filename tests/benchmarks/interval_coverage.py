"""How often 95% intervals of a mean over groups hold it: the interval of workbench.stats beside four others.

python tests/benchmarks/interval_coverage.py

Units are drawn from known distributions: normal; skewed, as losses are; and sparse, as the selection rates of an expert
are that one group in seven uses. Data sets that are constant have no interval and are not counted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student_t

from workbench.stats.resampling import t_interval

N_SETS, N_RESAMPLES = 2000, 600
Interval = Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


def plain_t(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    n, mean = len(values), values.mean(0)
    around = student_t.ppf(0.975, n - 1) * values.std(0, ddof=1) / np.sqrt(n)
    return mean - around, mean + around


def percentile(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.quantile(_weights(values, rng) @ values, (0.025, 0.975), axis=0)
    return low, high


def bca(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Bias-corrected and accelerated (Efron 1987)."""
    mean, drawn = values.mean(0), np.sort(_weights(values, rng) @ values, axis=0)
    below = (drawn < mean).mean(0) + 0.5 * (drawn == mean).mean(0)
    bias = norm.ppf(np.clip(below, 1 / N_RESAMPLES, 1 - 1 / N_RESAMPLES))
    off = values - mean
    speed = (off**3).sum(0) / (6 * np.maximum((off**2).sum(0), 1e-300) ** 1.5)
    ends = []
    for share in (0.025, 0.975):
        z = bias + norm.ppf(share)
        place = norm.cdf(bias + z / (1 - speed * z)) * N_RESAMPLES
        ends.append(np.take_along_axis(drawn, np.clip(place, 0, N_RESAMPLES - 1).astype(int)[None], 0)[0])
    return ends[0], ends[1]


def bootstrap_t(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Studentised bootstrap (Hall 1988); draws without spread count as infinitely far."""
    n, mean, weights = len(values), values.mean(0), _weights(values, rng)
    drawn = weights @ values
    variance = np.maximum(weights @ values**2 - drawn**2, 0) / (n - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(drawn == mean, 0.0, (drawn - mean) / np.sqrt(variance))
    low, high = np.quantile(t, (0.025, 0.975), axis=0, method="nearest")
    error = values.std(0, ddof=1) / np.sqrt(n)
    return mean - high * error, mean - low * error


def _weights(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:  # [resample unit]
    n = len(values)
    return rng.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES) / n


METHODS: dict[str, Interval] = {
    "here": lambda values, rng: t_interval(values),
    "t, n - 1": plain_t,
    "percentile": percentile,
    "BCa": bca,
    "bootstrap-t": bootstrap_t,
}
Shape = tuple[int, int]
DRAWS: dict[str, tuple[Callable[[np.random.Generator, Shape], np.ndarray], float]] = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.0),
    "exponential": (lambda rng, shape: rng.exponential(size=shape), 1.0),
    "lognormal": (lambda rng, shape: rng.lognormal(size=shape), float(np.exp(0.5))),
    "sparse, both signs": (lambda rng, shape: rng.normal(size=shape) * (rng.random(shape) < 0.15), 0.0),
    "sparse, positive": (lambda rng, shape: rng.random(shape) * (rng.random(shape) < 0.15), 0.075),
    "one in ten": (lambda rng, shape: (rng.random(shape) < 0.1).astype(float), 0.1),
}


def main() -> None:
    rng = np.random.default_rng(0)
    print("| units | distribution |", " | ".join(METHODS), "|")
    print("|---|---|" + "---|" * len(METHODS))
    for n in (10, 20, 40, 80):
        for name, (draw, true) in DRAWS.items():
            values = draw(rng, (n, N_SETS))
            values = values[:, values.std(0) > 0]
            shares = []
            for method in METHODS.values():
                low, high = method(values, rng)
                shares.append(f"{((low <= true) & (true <= high)).mean():.3f}")
            print(f"| {n} | {name} |", " | ".join(shares), "|")


if __name__ == "__main__":
    main()
