"""Every path of the Triton layer against the float64 oracle: shapes, formats, numerics, block sizes."""

from __future__ import annotations

import pytest
import torch
from moe_problems import BLOCKS, check, problem

from workbench_kernels.moe.blocks import choose_path, safe_blocks
from workbench_kernels.moe.plan import NEEDS, PATHS

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASES = [  # tokens, d_model, d_expert, experts, k
    (1, 37, 19, 8, 2, BF16), (2, 100, 36, 60, 4, F32), (3, 64, 32, 128, 8, BF16), (7, 101, 45, 60, 2, BF16),
    (16, 40, 72, 8, 8, BF16), (33, 37, 19, 4, 2, F32), (128, 36, 20, 8, 1, BF16),
]  # fmt: skip


def each_path() -> list[object]:
    """The cases on every path; decode goes slot by slot, and so does the interpreter: there, many slots are slow."""
    slow = {path: [pytest.mark.slow] if path == "decode" else [] for path in PATHS}
    return [
        pytest.param(path, *case, marks=slow[path] if case[0] * case[4] > 24 else [])
        for path in PATHS
        for case in CASES
    ]


@pytest.mark.parametrize(("path", "t", "d", "f", "e", "k", "dtype"), each_path())
def test_every_path_equals_the_oracle(path: str, t: int, d: int, f: int, e: int, k: int, dtype: torch.dtype) -> None:
    check(problem(t, d, f, e, k, dtype), path, need=NEEDS)


def all_sizes() -> list[tuple[str, int, int, int]]:
    """Every combination of sizes on the tile or, every other one, the skinny path; decode where slots are few."""
    sizes = [(t, e, k) for t in (1, 2, 3, 7, 16, 33, 128) for e in (4, 8, 60, 128) for k in (1, 2, 4, 8) if k <= e]
    grouped = [(("skinny", "tile")[i % 2], *size) for i, size in enumerate(sizes)]
    return grouped + [("decode", *size) for size in sizes if size[0] * size[2] <= 16]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "t", "e", "k"), all_sizes())
def test_all_sizes(path: str, t: int, e: int, k: int) -> None:
    check(problem(t, 45, 27, e, k, BF16, seed=t + e + k), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_weight_format(path: str, dtype: torch.dtype, bits: int) -> None:
    check(problem(5, 128, 64, 8, 2, dtype, bits), path, need=NEEDS)


@pytest.mark.parametrize("path", PATHS)
def test_int8_takes_odd_shapes(path: str) -> None:
    check(problem(5, 37, 19, 8, 2, BF16, bits=8), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", [16, 8])
def test_numerics_of_transformers(path: str, bits: int) -> None:
    check(problem(5, 37, 19, 8, 2, BF16, bits), path, need=NEEDS, numerics="hf")


@pytest.mark.parametrize("path", PATHS)
def test_half_precision_and_probabilities_as_weights(path: str) -> None:
    check(problem(5, 37, 19, 8, 3, F16), path, norm_topk_prob=False)


@pytest.mark.parametrize("path", ["skinny", "tile"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_tensor_descriptors_give_the_same_bits_as_pointers(path: str, bits: int) -> None:
    p = problem(9, 128, 64, 4, 2, BF16, bits)
    described = BLOCKS | {name: BLOCKS[name] | {"tma": True} for name in ("gate_up", "down")}
    y, _ = check(p, path, blocks=described)
    assert torch.equal(y, check(p, path)[0])


@pytest.mark.parametrize("path", ["skinny", "tile"])
def test_descriptors_over_rows_that_no_block_divides(path: str) -> None:
    """The last gate block reads up rows and the last up block the next expert's: computed, never stored."""
    described = BLOCKS | {name: BLOCKS[name] | {"tma": True} for name in ("gate_up", "down")}
    check(problem(9, 104, 40, 4, 2, BF16), path, need=NEEDS, blocks=described)


@pytest.mark.parametrize("dtype", [pytest.param(F32, marks=pytest.mark.slow), BF16])
@pytest.mark.parametrize("path", PATHS)
def test_the_safe_blocks(path: str, dtype: torch.dtype) -> None:
    check(problem(5, 72, 24, 8, 2, dtype), path, need=NEEDS, blocks=safe_blocks(path, dtype))


def test_auto_decides_by_the_number_of_tokens() -> None:
    assert [choose_path("auto", t, 128, 8) for t in (1, 4, 5, 256, 257, 4096)] == [
        "decode", "decode", "skinny", "skinny", "tile", "tile",
    ]  # fmt: skip
    assert choose_path("tile", 1, 128, 8) == "tile"
    from moe_problems import fused_moe

    args = problem(5, 24, 16, 4, 2).args
    assert fused_moe(*args, impl="triton")[1].path == "skinny"
