"""What two shortcuts of decoding on a CPU save, and what recording costs: CPU time, interleaved in one process.

    python tests/benchmarks/decode_parts.py [--models nano-moe-thinking mid-dense ...] [--runs 15] [--new 64]

Each run takes one part away: products slot by slot for up to four tokens, with the experts' matrices kept as views and
few probabilities sorted ("slots"), or the product with large weights in front ("weights"). All write the same tokens.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from generation_speed import measure, mid_size, report

import workbench.models.layers as layers
from workbench.io.hub import BUNDLED_DIR
from workbench.io.weights import load_model
from workbench_kernels import experts, fallback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--models", nargs="+", default=["nano-moe-thinking", "nano-dense-thinking"])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--new", type=int, default=64, help="tokens to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            path = mid_size(name, Path(folder) / name) if name.startswith("mid-") else BUNDLED_DIR / name
            compare(name, path, arguments)


def compare(name: str, path: Path, arguments: argparse.Namespace) -> None:
    model = load_model(path, dtype="float32")
    tokens = torch.randint(400, 2000, (arguments.batch, 32), generator=torch.Generator().manual_seed(0))
    kept = ["routing"] if model.cfg.is_moe else ["resid_post"]

    def write(without: str = "", record: tuple[str, ...] = ()) -> torch.Tensor:
        with leave_out(without):
            return model.generate(tokens, max_new_tokens=arguments.new, stop_ids=(), record=record).tokens

    runs = {
        "as it is": write,
        "without slots": lambda: write("slots"),
        "without weights": lambda: write("weights"),
        f"recording {kept[0]}": lambda: write(record=tuple(kept)),
    }
    print(f"{name}: {model.cfg.n_params / 1e6:.1f} million parameters, {arguments.batch} x 32 + {arguments.new} tokens")
    report(measure(runs, arguments.runs), "as it is")


@contextmanager
def leave_out(part: str) -> Iterator[None]:
    generate = sys.modules["workbench.models.generate"]
    with ExitStack() as stack:
        if part == "slots":
            stack.enter_context(patch.object(experts, "_FEW_TOKENS", 1))
            stack.enter_context(patch.object(fallback, "_FEW", 0))
            stack.enter_context(patch.object(generate, "experts_at_hand", lambda model: nullcontext()))
        if part == "weights":
            stack.enter_context(patch.object(layers, "_LARGE", sys.maxsize))
        yield


if __name__ == "__main__":
    main()
