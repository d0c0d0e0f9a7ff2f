"""Our models against transformers on random checkpoints that transformers wrote.

In float32 every tensor must agree to 2e-5 of its scale and every expert id exactly. In bfloat16 two implementations
cannot agree to a fixed number, so both are measured against transformers in float32 on the same (bfloat16) weights:
the squared error of each tensor, relative to its mean square, summed over layers and logits, must be no larger for
ours. All three runs take the experts that the float32 run chose, because one flipped expert would swamp the rounding
that is measured; which experts each would choose by itself is compared apart.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

from tests.parity_configs import (
    CASES,
    REAL_DENSE_LAYER,
    REAL_MOE_LAYER,
    ParityCase,
    hf_model,
    random_tokens,
    write_checkpoint,
)
from workbench.experiments.parity import activations, compare, hf_activations, parity
from workbench.io.weights import load_model
from workbench.models import Llama

pytest.importorskip("transformers")

TOLERANCE = 2e-5
by_name = {case.name: case for case in CASES}


def each(cases: list[ParityCase]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def is_ids(name: str) -> bool:
    return name.endswith("expert_ids")


def chosen(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if is_ids(name)}


def relative_error(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Mean squared difference over mean square, summed over all tensors but expert ids."""
    pairs = [(found[name].double(), value.double()) for name, value in reference.items() if not is_ids(name)]
    return sum(float((ours - theirs).pow(2).mean() / theirs.pow(2).mean()) for ours, theirs in pairs)


def assert_parity(frame: pl.DataFrame, case: ParityCase) -> None:
    assert frame["name"].to_list()[-2:] == ["ln_final", "logits"]
    n_layers = case.values["num_hidden_layers"]
    assert frame["name"].str.ends_with("hook_resid_post").sum() == n_layers
    assert frame["relative_diff"].max() <= TOLERANCE, frame
    if case.is_moe:
        assert frame["name"].str.ends_with("hook_router_logits").sum() > 0
        assert frame["tokens_differ"].sum() == 0, frame


# --- float32 ------------------------------------------------------------------------------------------------------


@each(CASES)
def test_float32_agrees_everywhere(case: ParityCase, tmp_path: Path) -> None:
    theirs = hf_model(case)
    ours = load_model(write_checkpoint(theirs, case, tmp_path))
    assert_parity(parity(ours, theirs, random_tokens(case)), case)


@each([by_name["llama_gqa_6_2_llama3"], by_name["moe"], by_name["moe_sparse_step_2"]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_agree_with_transformers_and_with_unpadded_runs(
    case: ParityCase, side: str, tmp_path: Path
) -> None:
    theirs = hf_model(case)
    ours = load_model(write_checkpoint(theirs, case, tmp_path))
    tokens = random_tokens(case, batch=3)
    lengths = [40, 23, 1]
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        mask[row, slice(-length, None) if side == "left" else slice(0, length)] = 1
    tokens[mask == 0] = 4
    assert_parity(parity(ours, theirs, tokens, mask), case)
    alone = [activations(ours, tokens[row : row + 1, mask[row].bool()]) for row in range(3)]
    unpadded = {name: torch.cat([found[name] for found in alone]) for name in alone[0]}
    assert_parity(
        compare(activations(ours, tokens, mask), {name: unpadded[name] for name in _in_order(unpadded)}), case
    )


def _in_order(found: Mapping[str, Tensor]) -> list[str]:
    return [*(name for name in found if name not in ("ln_final", "logits")), "ln_final", "logits"]


@each([by_name["llama_mqa_5_1_tied"], by_name["moe_dense_layers_tied"], by_name["moe_fused"]])
def test_gradients_agree(case: ParityCase, tmp_path: Path) -> None:
    theirs = hf_model(case)
    ours = load_model(write_checkpoint(theirs, case, tmp_path / "theirs"))
    tokens = random_tokens(case)
    for model, logits in ((theirs, theirs(tokens).logits), (ours, ours(tokens))):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    # Swap each gradient in for its weight and let the loader sort out whose is whose.
    for param in theirs.parameters():
        param.data = param.grad
    gradients = dict(load_model(write_checkpoint(theirs, case, tmp_path / "gradients")).named_parameters())
    for name, param in ours.named_parameters():
        assert param.grad is not None, name
        difference = (param.grad - gradients[name]).abs().max() / gradients[name].abs().max()
        assert difference <= 5 * TOLERANCE, (name, difference)


@each([by_name["llama_mha"], by_name["moe"]])
def test_parity_notices_what_is_wrong(case: ParityCase, tmp_path: Path) -> None:
    theirs = hf_model(case)
    ours = load_model(write_checkpoint(theirs, case, tmp_path))
    tokens = random_tokens(case)
    with torch.no_grad():
        theirs.model.layers[2].input_layernorm.weight[0] *= 1.01
    frame = parity(ours, theirs, tokens)
    residual = frame.filter(pl.col("name").str.ends_with("hook_resid_post"))["relative_diff"]
    assert residual[:2].max() <= TOLERANCE
    assert residual[2:].min() > TOLERANCE
    assert frame["relative_diff"][-1] > TOLERANCE


def test_parity_notices_another_router(tmp_path: Path) -> None:
    case = by_name["moe"]
    theirs = hf_model(case)
    ours = load_model(write_checkpoint(theirs, case, tmp_path))
    with torch.no_grad():
        theirs.model.layers[0].mlp.gate.weight.copy_(theirs.model.layers[0].mlp.gate.weight.roll(1, dims=0))
    first = parity(ours, theirs, random_tokens(case)).row(1, named=True)
    assert first["name"] == "blocks.0.mlp.hook_expert_ids"
    assert first["tokens_differ"] == 80
    assert first["relative_diff"] is None


# --- bfloat16, and bit for bit -------------------------------------------------------------------------------------


def assert_no_further_than_transformers(
    ours: Llama, theirs: Any, reference: Mapping[str, Tensor], tokens: Tensor
) -> None:
    our_run = activations(ours, tokens, expert_ids=chosen(reference))
    their_run = hf_activations(theirs, tokens, expert_ids=chosen(reference))
    assert 0 < relative_error(our_run, reference) <= relative_error(their_run, reference)
    assert_ids_follow_from_logits(activations(ours, tokens), reference)


def assert_ids_follow_from_logits(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
    """Where other experts are chosen, the reference's own logits must have been closer than the error allows."""
    for name in chosen(reference):
        exact = reference[name.replace("expert_ids", "router_logits")].double()
        error = (found[name.replace("expert_ids", "router_logits")].double() - exact).abs().amax(-1)
        weakest = exact.gather(-1, found[name]).amin(-1)
        threshold = exact.gather(-1, reference[name]).amin(-1)
        assert bool((threshold - weakest <= 2 * error + 1e-12).all()), name


@each(CASES)
def test_bfloat16_is_no_further_from_float32_than_transformers(case: ParityCase, tmp_path: Path) -> None:
    theirs = hf_model(case, torch.bfloat16)
    ours = load_model(write_checkpoint(theirs, case, tmp_path))
    assert ours.dtype == torch.bfloat16
    tokens = random_tokens(case, batch=8)  # enough tokens that the comparison is not decided by chance
    reference = hf_activations(deepcopy(theirs).float(), tokens)
    assert_no_further_than_transformers(ours, theirs, reference, tokens)


@each([case for case in CASES if case.experts == "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_in_the_models_dtype_is_transformers_bit_for_bit(
    case: ParityCase, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Against "grouped_mm", which sums slots in rank order as we do; "eager" adds them in order of expert id."""
    theirs = hf_model(case, dtype)
    ours = load_model(write_checkpoint(theirs, case, tmp_path), router_dtype="model")
    frame = parity(ours, theirs, random_tokens(case))
    assert frame["max_abs_diff"].max() == 0, frame
    assert frame["tokens_differ"].sum() == 0, frame


# --- real widths --------------------------------------------------------------------------------------------------


def check_real_layer(case: ParityCase, directory: Path) -> None:
    """One layer of a real model: bfloat16 as shipped, bit for bit with router_dtype "model", and float32."""
    tokens = random_tokens(case)
    theirs = hf_model(case, torch.bfloat16)
    try:
        write_checkpoint(theirs, case, directory)
        exact = deepcopy(theirs).float()
        assert_parity(parity(load_model(directory, dtype="float32"), exact, tokens), case)
        reference = hf_activations(exact, tokens)
        del exact
        assert_no_further_than_transformers(load_model(directory), theirs, reference, tokens)
        assert parity(load_model(directory, router_dtype="model"), theirs, tokens)["max_abs_diff"].max() == 0
    finally:
        shutil.rmtree(directory)  # pytest would keep gigabytes of it


@pytest.mark.slow
def test_one_layer_at_the_width_of_the_8b(tmp_path: Path) -> None:
    check_real_layer(REAL_DENSE_LAYER, tmp_path / "checkpoint")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute on two idle cores, but gigabytes to write and to compute on
def test_one_layer_at_the_width_of_the_32b_a3b(tmp_path: Path) -> None:
    check_real_layer(REAL_MOE_LAYER, tmp_path / "checkpoint")
