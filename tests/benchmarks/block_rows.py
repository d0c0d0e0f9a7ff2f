"""What a block of fixed shape costs: CPU time of one decoding pass, by its rows, for a sequence alone and a full block.

Interleaved in one process, one thread, medians of `--rounds`; ratios are to a pass of one row.

    python tests/benchmarks/block_rows.py nano-moe-thinking nano-dense-thinking
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from workbench import load_model
from workbench.models import KVCache, Llama
from workbench.models.blocks import decode_block

ROWS = (1, 4, 8, 16)
CONTEXT = 60


def filled(model: Llama, room: int, seed: int) -> KVCache:
    draw = torch.Generator().manual_seed(seed)
    cache = model.new_cache(1, room)
    prompt = torch.randint(14, model.cfg.d_vocab, (1, CONTEXT), generator=draw)
    model(prompt, cache=cache, stop_at_layer=model.cfg.n_layers)
    return cache


@torch.inference_mode()
def measure(model: Llama, rounds: int) -> dict[tuple[int, int], float]:
    """Median seconds by (rows of the block, sequences in it)."""
    kinds = [(rows, n) for rows in ROWS for n in dict.fromkeys((1, rows))]
    caches = [filled(model, CONTEXT + len(kinds) * (rounds + 1), seed) for seed in range(max(ROWS))]
    seconds: dict[tuple[int, int], list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds + 1):
        for rows, n in kinds:
            began = time.process_time()
            decode_block(model, [20] * n, caches[:n], rows)
            seconds[rows, n].append(time.process_time() - began)
    return {kind: statistics.median(times[1:]) for kind, times in seconds.items()}  # the first one warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.models:
        found = measure(load_model(name, dtype=arguments.dtype), arguments.rounds)
        one = found[1, 1]
        print(f"{name}, {arguments.dtype}: one row {one * 1e3:.2f} ms")
        for rows in ROWS[1:]:
            alone, full = found[rows, 1], found[rows, rows]
            print(
                f"  block of {rows:2}: alone {alone / one:.2f} x, tokens per second when full {rows * one / full:.2f} x"
            )


if __name__ == "__main__":
    main()
