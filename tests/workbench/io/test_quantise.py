"""Quantised experts in a model: loading, moving, what they cost in error and memory, and what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from workbench.config import Qwen3MoeConfig, RopeConfig
from workbench.errors import CheckpointError, ConfigError
from workbench.family import FAMILY
from workbench.io.quantise import memory, model_bytes, quantise_experts
from workbench.io.saving import save_model
from workbench.io.weights import load_model
from workbench.models import Llama, build_model, init_weights
from workbench.models.moe_weights import QuantizedWeight

CFG = Qwen3MoeConfig(
    d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, d_head=16, d_mlp=96, d_vocab=101, n_ctx=64, norm_eps=1e-6,
    rope=RopeConfig(theta=1e4), n_experts=6, k=2, d_expert=64, sparse_layers=(True, False, True),
)  # fmt: skip
TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="int8 or int4 experts with moe_impl")
        yield


@pytest.fixture
def plain() -> Llama:
    return init_weights(build_model(CFG), seed=0, std=0.1)


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("experts", ["int8", "int4"])
def test_loading_quantised_equals_quantising_what_was_loaded(
    plain: Llama, tmp_path: Path, layout: str, experts: str
) -> None:
    path = save_model(plain, tmp_path / "model", layout=layout)
    loaded, converted = load_model(path, experts=experts), load_model(path)
    errors = quantise_experts(converted, experts)
    buffers = dict(converted.named_buffers())
    assert sum(isinstance(module, QuantizedWeight) for module in loaded.modules()) == 4
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in loaded.named_buffers())
    assert torch.equal(loaded(TOKENS), converted(TOKENS))
    assert loaded.expert_errors.shape == errors.shape == (2 * 2 * 6, 6)
    assert loaded.expert_errors["relative_error"].to_list() == pytest.approx(errors["relative_error"].to_list())
    assert sorted(set(errors["layer"])) == [0, 2]
    bound = 0.01 if experts == "int8" else 0.12
    assert 0 < errors["relative_error"].max() < bound


@pytest.mark.parametrize(("experts", "bound"), [("int8", 0.02), ("int4", 0.25)])
def test_the_quantised_model_computes_with_the_dequantised_weights(plain: Llama, experts: str, bound: float) -> None:
    exact = plain(TOKENS)
    rounded, small = copy.deepcopy(plain), copy.deepcopy(plain)
    quantise_experts(small, experts)
    with torch.no_grad():
        for block, other in zip(rounded.blocks, small.blocks, strict=True):
            for name in ("gate_up", "down") if hasattr(block.mlp, "gate_up") else ():
                getattr(block.mlp, name).copy_(getattr(other.mlp, name).experts().dequantize())
    torch.testing.assert_close(small(TOKENS), rounded(TOKENS), atol=1e-5, rtol=1e-4)
    assert 0 < float((small(TOKENS) - exact).detach().norm() / exact.detach().norm()) < bound


def test_hooks_work_and_a_cast_leaves_the_scales_alone(plain: Llama) -> None:
    quantise_experts(plain, "int8")
    seen: dict[str, torch.Tensor] = {}
    hook = ("blocks.0.mlp.hook_expert_out", lambda value, hook: seen.setdefault("out", value))
    plain.run_with_hooks(TOKENS, fwd_hooks=[hook])
    assert seen["out"].shape == (2, 12, 2, 64)
    scales = plain.blocks[0].mlp.gate_up.scales.clone()
    half = plain.to(torch.bfloat16)
    assert half.blocks[0].mlp.gate_up.scales.dtype == torch.float32
    assert torch.equal(half.blocks[0].mlp.gate_up.scales, scales)
    assert half(TOKENS).dtype == torch.bfloat16


def test_the_real_model_fits_the_cards_it_should() -> None:
    cfg = FAMILY["llm-jp-4-32b-a3b-thinking"].config
    frame = memory(cfg).rows_by_key("experts", named=True, unique=True)
    assert (frame["plain"]["fits_48"], frame["plain"]["fits_80"]) == (False, True)
    assert (frame["int8"]["fits_24"], frame["int8"]["fits_48"]) == (False, True)
    assert frame["int4"]["fits_24"]
    assert frame["plain"]["weight_bytes"] == 2 * cfg.n_params
    assert memory(FAMILY["llm-jp-4-8b-base"].config)["experts"].to_list() == ["plain"]


def test_the_arithmetic_counts_the_bytes_of_a_model(plain: Llama) -> None:
    model = plain.to(torch.bfloat16)
    for bits, experts in ((8, "int8"), (4, "int4")):
        small = copy.deepcopy(model)
        quantise_experts(small, experts)
        tensors = [*small.parameters(), *small.buffers()]
        assert sum(tensor.nbytes for tensor in tensors) == model_bytes(CFG, bits)


def test_what_cannot_be_quantised_is_refused(plain: Llama, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="experts: expected one of plain, int8, int4, got 'int2'"):
        build_model(CFG, experts="int2")
    with pytest.raises(ConfigError, match=r"expected a divisor of the 96 input columns, got 64\. Use int8"):
        build_model(replace(CFG, d_model=96), experts="int4")
    with pytest.raises(ConfigError, match="expected triton, sorted or reference for quantised experts"):
        build_model(CFG, experts="int8", moe_impl="grouped_mm")
    quantise_experts(plain, "int8")
    with pytest.raises(ConfigError, match="a model with plain experts"):
        quantise_experts(plain, "int4")
    with pytest.raises(CheckpointError, match="expected plain experts, got quantised ones"):
        save_model(plain, tmp_path / "out")


def test_a_fallback_says_that_it_dequantises() -> None:
    with pytest.warns(UserWarning, match="moe_impl 'sorted': every expert that is hit is dequantised in every call"):
        model = build_model(CFG, experts="int8")
    assert model.moe_impl == "sorted"
