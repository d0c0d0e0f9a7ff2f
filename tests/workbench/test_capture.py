from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from conftest import QWEN3_MOE

from workbench.axes import ROUTING_COLUMNS
from workbench.capture import (
    capture_routing,
    expert_peaks,
    pad,
    routed_layers,
    router_inputs,
    suitable_threads,
    weights_hash,
    write_answers,
)
from workbench.errors import ConfigError, ShapeError
from workbench.models import Llama, Qwen3Moe, build_model, init_weights
from workbench.models.recording import router_entropy, router_margin

SEQUENCES = [[5, 9, 17, 30, 22], [8], [40, 41, 42]]


def test_routing_of_a_padded_batch_is_that_of_each_sequence_alone(moe: Qwen3Moe) -> None:
    together = capture_routing(moe, SEQUENCES)
    alone = [capture_routing(moe, [sequence]) for sequence in SEQUENCES]
    assert together.layers == (0, 2)
    assert together.expert_ids.shape == (9, 2, 3)  # padding is nowhere
    np.testing.assert_array_equal(together.expert_ids, np.concatenate([one.expert_ids for one in alone]))
    for name in ("routing_weights", "router_entropy", "router_margin"):
        np.testing.assert_allclose(
            getattr(together, name), np.concatenate([getattr(one, name) for one in alone]), atol=1e-5
        )


def test_routing_is_what_the_model_shows_at_its_hook_points(moe: Qwen3Moe) -> None:
    routing = capture_routing(moe, SEQUENCES[:1])
    _, cache = moe.run_with_cache(torch.tensor(SEQUENCES[:1]))
    logits = cache["blocks.2.mlp.hook_router_logits"][0]
    np.testing.assert_array_equal(routing.expert_ids[:, 1], cache["blocks.2.mlp.hook_expert_ids"][0])
    np.testing.assert_allclose(routing.routing_weights[:, 1], cache["blocks.2.mlp.hook_routing_weights"][0], atol=1e-6)
    ordered = logits.sort(descending=True).values
    np.testing.assert_allclose(routing.router_margin[:, 1], ordered[:, 2] - ordered[:, 3], atol=1e-5)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    np.testing.assert_allclose(routing.router_entropy[:, 1], expected, atol=1e-5)


def test_mass_lse_and_weights_give_back_probabilities_and_logits(moe: Qwen3Moe) -> None:
    routing = capture_routing(moe, SEQUENCES, router_logits=True)
    chosen = np.take_along_axis(routing.router_logits, routing.expert_ids.astype(int), axis=-1)  # [token layer k]
    probs = routing.routing_weights * routing.router_mass[..., None]
    np.testing.assert_allclose(np.log(probs) + routing.router_lse[..., None], chosen, atol=1e-5)
    assert (routing.router_mass < 1).all()


def test_norms_are_those_of_what_the_experts_add(moe: Qwen3Moe) -> None:
    routing = capture_routing(moe, SEQUENCES, norms=True)
    _, cache = moe.run_with_cache(torch.tensor(SEQUENCES[:1]), names_filter=lambda name: True)
    out = cache["blocks.2.mlp.hook_expert_out"][0] * cache["blocks.2.mlp.hook_routing_weights"][0][..., None]
    np.testing.assert_allclose(routing.expert_norms[:5, 1], out.norm(dim=-1), rtol=1e-4)
    np.testing.assert_allclose(routing.mlp_out_norm[:5, 1], out.sum(1).norm(dim=-1), rtol=1e-4)
    np.testing.assert_allclose(
        routing.mlp_in_norm[:5, 0], cache["blocks.0.ln2.hook_normalized"][0].norm(dim=-1), rtol=1e-4
    )
    assert capture_routing(moe, SEQUENCES).expert_norms is None


def test_frame_has_one_row_per_token_and_layer_in_order(moe: Qwen3Moe) -> None:
    routing = capture_routing(moe, SEQUENCES[1:])
    frame = routing.frame(["a", "b", "b", "b"], [0, 0, 1, 2])
    assert frame.columns == list(ROUTING_COLUMNS)
    assert frame.select("doc_id", "pos", "layer").rows()[:4] == [("a", 0, 0), ("a", 0, 2), ("b", 0, 0), ("b", 0, 2)]
    assert frame["expert_ids"].to_list()[3] == routing.expert_ids[1, 1].tolist()
    assert frame["routing_weights"].list.sum().to_list() == pytest.approx([1.0] * 8, abs=1e-6)


def test_load_counts_every_slot_in_its_cell(moe: Qwen3Moe) -> None:
    routing = capture_routing(moe, SEQUENCES[1:])
    load = routing.load([(0, 1), (1, 0), (1, 0), (1, 1)], (2, 2))
    assert load.shape == (2, 2, 2, 8)
    assert load.sum((2, 3)).tolist() == [[0, 6], [12, 6]]  # tokens x 2 layers x 3 experts
    frame = routing.frame(["a", "b", "b", "b"], [0, 0, 1, 2])
    cell = frame.filter(pl.col("doc_id") == "b", pl.col("pos") < 2, pl.col("layer") == 2)
    counted = np.bincount(cell["expert_ids"].explode(), minlength=8)
    np.testing.assert_array_equal(load[1, 0, 1], counted)


def test_the_margin_does_not_exist_when_all_experts_are_chosen() -> None:
    assert router_margin(torch.randn(4, 3), k=3).isnan().all()
    assert router_margin(torch.tensor([5.0, 1.0, 3.0]), k=2).item() == 2.0
    assert router_entropy(torch.zeros(8)).item() == pytest.approx(np.log(8))


def test_a_dense_model_is_refused_in_one_line(llama: Llama) -> None:
    with pytest.raises(ConfigError, match="expected a mixture of experts, got 'llama'"):
        routed_layers(llama)


def test_a_mixture_of_experts_without_a_sparse_layer_is_refused(moe: Qwen3Moe) -> None:
    dense = build_model(replace(moe.cfg, sparse_layers=(False,) * moe.cfg.n_layers))
    with pytest.raises(ConfigError, match="expected a layer with experts, got dense ones only"):
        routed_layers(dense)


def test_answers_of_a_batch_are_those_of_each_prompt_alone(moe: Qwen3Moe) -> None:
    together = write_answers(moe, SEQUENCES, max_new_tokens=6, stop_ids=[2])
    assert together == [write_answers(moe, [prompt], 6, stop_ids=[2])[0] for prompt in SEQUENCES]
    assert write_answers(moe, SEQUENCES, max_new_tokens=0) == [[], [], []]


def test_an_answer_ends_with_its_stop_token(moe: Qwen3Moe) -> None:
    free = write_answers(moe, SEQUENCES[:1], 6, stop_ids=[])[0]
    stopped = write_answers(moe, SEQUENCES[:1], 6, stop_ids=[free[2]])[0]
    assert stopped == free[: free.index(free[2]) + 1]


def test_prompts_that_do_not_fit_are_named(moe: Qwen3Moe) -> None:
    with pytest.raises(ShapeError, match=r"expected 1 to 62 tokens.*got 63"):
        write_answers(moe, [[5] * 63], max_new_tokens=2)
    with pytest.raises(ShapeError, match=r"max_new_tokens: expected fewer than the context's 64 tokens.*got 64"):
        write_answers(moe, [[5]], max_new_tokens=64)
    with pytest.raises(ShapeError, match="got 0"):
        capture_routing(moe, [[5], []])


def test_small_models_run_on_one_thread_and_the_setting_is_restored(moe: Qwen3Moe) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with suitable_threads(moe):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_padding_stands_on_the_side_asked_for() -> None:
    tokens, mask = pad([[7, 8], [9]], left=True)
    assert tokens.tolist() == [[7, 8], [4, 9]]
    assert mask.tolist() == [[1, 1], [0, 1]]
    assert pad([[7, 8], [9]], left=False)[0].tolist() == [[7, 8], [9, 4]]


def test_the_weights_hash_tells_models_apart_and_nothing_else(moe: Qwen3Moe) -> None:
    twin = init_weights(build_model(moe.cfg), seed=1, std=0.2)
    assert weights_hash(moe) == weights_hash(twin)
    assert weights_hash(moe) != weights_hash(twin.bfloat16())
    with torch.no_grad():
        moe.blocks[2].mlp.router.weight[3, 4] += 1e-3
    assert weights_hash(moe) != weights_hash(init_weights(build_model(moe.cfg), seed=1, std=0.2))


def test_a_knocked_out_expert_leaves_entropy_and_margin_finite(moe: Llama) -> None:
    def without_expert_5(router_logits: torch.Tensor, hook: object) -> torch.Tensor:
        router_logits = router_logits.clone()
        router_logits[..., 5] = -torch.inf
        return router_logits

    with moe.hooks([("blocks.0.mlp.hook_router_logits", without_expert_5)]):
        routing = capture_routing(moe, [[5, 6, 7]])
    assert np.isfinite(routing.router_entropy).all()
    assert np.isfinite(routing.router_margin).all()


def test_a_margin_with_nothing_left_to_choose_is_nan() -> None:
    logits = torch.tensor([[2.0, 1.0, -torch.inf, -torch.inf], [2.0, 1.0, 0.5, -torch.inf]])
    margin = router_margin(logits, k=2)
    assert margin[0].isnan()
    assert margin[1] == 0.5


@pytest.mark.parametrize("place", [0, 1, 4095, 4097, 9999])
def test_the_weights_hash_sees_every_value_of_a_large_parameter(moe: Llama, place: int) -> None:
    moe.embed = torch.nn.Embedding(100, 100)
    before = weights_hash(moe, sample=64)
    with torch.no_grad():
        moe.embed.weight.view(-1)[place] += 1
    assert weights_hash(moe, sample=64) != before


def test_peaks_are_the_largest_components_of_expert_outputs(moe: Qwen3Moe) -> None:
    peaks = expert_peaks(moe, SEQUENCES)
    assert peaks["layer"].unique().to_list() == [0, 2]
    largest = np.zeros(8)
    for sequence in SEQUENCES:
        _, cache = moe.run_with_cache(torch.tensor([sequence]), names_filter=lambda name: True)
        ids, out = cache["blocks.2.mlp.hook_expert_ids"][0], cache["blocks.2.mlp.hook_expert_out"][0]
        for chosen, value in zip(ids.flatten(), out.abs().amax(-1).flatten(), strict=True):
            largest[chosen] = max(largest[chosen], float(value))
    np.testing.assert_allclose(peaks.filter(pl.col("layer") == 2)["peak"], largest, rtol=1e-4)


def test_router_inputs_are_means_over_real_tokens(moe: Qwen3Moe) -> None:
    frame = router_inputs(moe, ["a", "b", "c"], SEQUENCES)
    _, cache = moe.run_with_cache(torch.tensor(SEQUENCES[2:]))
    mine = frame.filter(pl.col("doc_id") == "c", pl.col("layer") == 2)["mean_in"].to_list()[0]
    np.testing.assert_allclose(mine, cache["blocks.2.ln2.hook_normalized"][0].mean(0), atol=1e-5)
    assert len(frame) == 6


@pytest.mark.filterwarnings("ignore:int8 or int4 experts")
def test_the_weights_hash_sees_quantised_experts() -> None:
    model = build_model(QWEN3_MOE, experts="int8")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.zero_()
    before = weights_hash(model)
    next(buffer for buffer in model.buffers() if buffer.dtype == torch.int8).view(-1)[7] = 1
    assert weights_hash(model) != before
