"""Positions, padding, caches and partial runs: whatever the route, the same numbers."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from conftest import LLAMA
from torch import Tensor

from workbench.config import RopeConfig
from workbench.errors import ConfigError, ShapeError
from workbench.models import Llama, build_model, init_weights
from workbench.models.layers import rotary_frequencies


def pad(tokens: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    batch = tokens.shape[0]
    parts = [torch.full((batch, left), 4), tokens, torch.full((batch, right), 4)]
    masks = [torch.zeros(batch, left), torch.ones(tokens.shape), torch.zeros(batch, right)]
    return torch.cat(parts, 1), torch.cat(masks, 1).long()


@pytest.mark.parametrize(("left", "right"), [(5, 0), (0, 5), (3, 4)])
@pytest.mark.parametrize("attn_impl", ["sdpa", "eager"])
def test_padding_changes_nothing(model: Llama, tokens: Tensor, left: int, right: int, attn_impl: str) -> None:
    for block in model.blocks:
        block.attn.attn_impl = attn_impl
    padded, mask = pad(tokens, left, right)
    logits = model(padded, mask)
    assert torch.allclose(logits[:, left : left + 7], model(tokens), atol=2e-6)
    assert torch.isfinite(logits).all(), "padding makes NaN"


def test_rows_of_different_length_equal_themselves_alone(model: Llama, tokens: Tensor) -> None:
    short = tokens[1:, :4]
    row, mask = pad(short, 3, 0)
    batch = model(torch.cat([tokens[:1], row]), torch.cat([torch.ones(1, 7).long(), mask]))
    assert torch.allclose(batch[0], model(tokens[:1])[0], atol=2e-6)
    assert torch.allclose(batch[1, 3:], model(short)[0], atol=2e-6)


def test_what_stands_at_padding_does_not_matter(model: Llama, tokens: Tensor) -> None:
    padded, mask = pad(tokens, 3, 0)
    other = padded.clone()
    other[:, :3] = 17
    assert torch.allclose(model(padded, mask)[:, 3:], model(other, mask)[:, 3:], atol=1e-6)


def test_a_token_sees_only_the_past(model: Llama, tokens: Tensor) -> None:
    later = tokens.clone()
    later[:, 5:] = 6
    assert torch.allclose(model(later)[:, :5], model(tokens)[:, :5], atol=1e-6)
    assert (model(later)[:, 6] - model(tokens)[:, 6]).abs().max() > 1e-3


def test_a_run_can_be_cut_at_any_layer(model: Llama, tokens: Tensor) -> None:
    whole = model(tokens)
    padded, mask = pad(tokens, 2, 0)
    for layer in range(4):
        resid = model(tokens, stop_at_layer=layer)
        assert torch.equal(model(resid, start_at_layer=layer), whole)
        cut = model(model(padded, mask, stop_at_layer=layer), mask, start_at_layer=layer)
        assert torch.equal(cut, model(padded, mask))
    _, cache = model.run_with_cache(tokens, stop_at_layer=2)
    assert "blocks.1.hook_resid_post" in cache
    assert "blocks.2.hook_resid_pre" not in cache
    assert torch.equal(cache["resid_post", 1], model(tokens, stop_at_layer=2))


@pytest.mark.parametrize("chunks", [[7], [4, 3], [1] * 7, [2, 1, 4]])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_cache_filled_in_chunks_equals_one_pass(
    model: Llama, tokens: Tensor, chunks: list[int], padding: int
) -> None:
    padded, mask = pad(tokens, padding, 0)
    cache = model.new_cache(2, 16)
    ends = torch.tensor([0, *chunks]).cumsum(0) + padding
    ends[0] = 0
    with torch.no_grad():
        parts = [
            model(padded[:, a:b], mask[:, a:b] if padding else None, cache=cache) for a, b in pairwise(ends.tolist())
        ]
        whole = model(padded, mask if padding else None)
    assert torch.allclose(torch.cat(parts, 1)[:, padding:], whole[:, padding:], atol=1e-5)


def test_a_full_cache_says_so(llama: Llama, tokens: Tensor) -> None:
    cache = llama.new_cache(2, 8)
    with torch.no_grad():
        llama(tokens, cache=cache)
        with pytest.raises(ShapeError, match="cache: expected at most 8 positions, got 14"):
            llama(tokens, cache=cache)


def test_a_cache_wants_its_own_batch_and_whole_runs(llama: Llama, tokens: Tensor) -> None:
    with torch.no_grad():
        with pytest.raises(ShapeError, match="cache: expected 3 sequences, got 2"):
            llama(tokens, cache=llama.new_cache(3, 8))
        with pytest.raises(ShapeError, match="cache: expected a run through all layers"):
            llama(tokens, cache=llama.new_cache(2, 8), stop_at_layer=1)
    with pytest.raises(ShapeError, match=r"under torch.no_grad\(\)"):
        llama(tokens, cache=llama.new_cache(2, 8))


def test_a_chunk_may_be_padding_only(model: Llama, tokens: Tensor) -> None:
    padded, mask = pad(tokens, 5, 0)
    cache = model.new_cache(2, 12)
    with torch.no_grad():
        model(padded[:, :4], mask[:, :4], cache=cache)
        logits = model(padded[:, 4:], mask[:, 4:], cache=cache)
    assert torch.allclose(logits[:, 1:], model(tokens), atol=3e-6)


def test_sdpa_and_eager_agree(model: Llama, tokens: Tensor) -> None:
    logits = model(tokens)
    for block in model.blocks:
        block.attn.attn_impl = "eager"
    assert torch.allclose(model(tokens), logits, atol=2e-6)


def test_what_heads_add_sums_to_the_attention_output(model: Llama, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens, names_filter=["blocks.1.attn.hook_result", "blocks.1.hook_attn_out"])
    assert torch.allclose(cache["result", 1].sum(2), cache["attn_out", 1], atol=1e-6)


def test_the_residual_stream_is_the_sum_of_its_parts(model: Llama, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens)
    parts = sum(cache["attn_out", layer] + cache["mlp_out", layer] for layer in range(3))
    assert torch.allclose(cache["hook_embed"] + parts, cache["resid_post", 2], atol=1e-5)
    assert torch.equal(cache["resid_post", 0], cache["resid_pre", 1])


def test_the_norm_scale_is_the_root_mean_square(model: Llama, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens)
    resid = cache["resid_pre", 1]
    rms = resid.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
    assert torch.allclose(cache["blocks.1.ln1.hook_scale"], rms, rtol=1e-5)
    assert torch.allclose(cache["blocks.1.ln1.hook_normalized"], resid / rms, atol=1e-5)


def test_tied_embeddings_are_one_tensor() -> None:
    model = init_weights(build_model(dataclasses.replace(LLAMA, tie_embeddings=True)), 0)
    assert model.unembed.weight is model.embed.weight
    assert "unembed.weight" not in dict(model.named_parameters())


def test_linear_rope_stretches_positions() -> None:
    cpu = torch.device("cpu")
    plain = rotary_frequencies(RopeConfig(1e4), 16, cpu)
    assert torch.allclose(rotary_frequencies(RopeConfig(1e4, "linear", 4.0), 16, cpu), plain / 4)
    llama3 = rotary_frequencies(RopeConfig(1e4, "llama3", 8.0, 1.0, 4.0, 64), 16, cpu)
    assert torch.equal(llama3[0], plain[0]), "short wavelengths are kept"
    assert torch.allclose(llama3[-1], plain[-1] / 8), "long wavelengths are stretched"


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (torch.tensor([[1, 60]]), None, "tokens: expected ids from 0 to 59, got 1 to 60"),
        (torch.tensor([[-1, 3]]), None, "tokens: expected ids from 0 to 59, got -1 to 3"),
        (torch.tensor([1, 2]), None, r"tokens: expected integers \[batch pos\].*, got \(2,\).*tokens\[None\]"),
        (torch.tensor([[1.0]]), None, "tokens: expected integers"),
        ([[1, 2]], None, r"tokens: expected a tensor \[batch pos\], got list"),
        (torch.ones(1, 0).long(), None, "tokens: expected integers"),
        (torch.ones(1, 2).long(), [[1, 1]], r"attention_mask: expected a tensor \[batch pos\], got list"),
        (torch.ones(1, 65).long(), None, "pos: expected at most 64 positions, got 65"),
        (torch.ones(2, 3).long(), torch.ones(2, 4), r"attention_mask: expected \[batch pos\] \(2, 3\), got \(2, 4\)"),
        (torch.ones(2, 3).long(), torch.full((2, 3), 0.5), "attention_mask: expected 1 at tokens and 0 at padding"),
        (torch.ones(2, 3).long(), torch.tensor([[1, 1, 1], [0, 0, 0]]), "got a row of padding only"),
    ],
)
def test_input_that_does_not_fit_is_named(llama: Llama, tokens: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        llama(tokens, mask)


def test_layers_that_do_not_exist_are_named(llama: Llama, tokens: Tensor) -> None:
    with pytest.raises(ShapeError, match="expected 0 <= start <= stop <= 3, got None, 4"):
        llama(tokens, stop_at_layer=4)
    for given, got in [
        (tokens, r"\(2, 7\) torch.int64"),
        (tokens.tolist(), "list"),
        (None, "NoneType"),
        (torch.zeros(0, 7, 32), r"\(0, 7, 32\)"),
        (torch.zeros(2, 0, 32), r"\(2, 0, 32\)"),
    ]:
        with pytest.raises(ShapeError, match=rf"start_at_layer: expected a residual stream \[batch pos 32\] .*{got}"):
            llama(given, start_at_layer=1)


def test_what_is_no_text_has_no_tokens(llama: Llama) -> None:
    llama.tokenizer = object()
    with pytest.raises(ShapeError, match="texts: expected a text or a list of them, got 5"):
        llama.to_tokens(5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.bool, torch.complex64])
def test_tokens_of_another_dtype_are_refused(model: Llama, tokens: torch.Tensor, dtype: torch.dtype) -> None:
    with pytest.raises(ShapeError, match="tokens: expected integers"):
        model(tokens.to(dtype))


@pytest.mark.parametrize("layers", [{"stop_at_layer": 1.5}, {"stop_at_layer": "3"}, {"stop_at_layer": True}])
def test_layers_are_whole_numbers(model: Llama, tokens: torch.Tensor, layers: dict) -> None:
    with pytest.raises(ShapeError, match="start_at_layer, stop_at_layer: expected"):
        model(tokens, **layers)


def test_a_pass_that_failed_leaves_no_padding_in_the_cache(model: Llama, tokens: torch.Tensor) -> None:
    def fail(x: torch.Tensor, hook: object) -> None:
        raise RuntimeError("on purpose")

    mask = torch.ones_like(tokens)
    mask[:, 0] = 0
    cache = model.new_cache(2, 16)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="on purpose"):
            model.run_with_hooks(tokens, attention_mask=mask, cache=cache, fwd_hooks=[("hook_embed", fail)])
        torch.testing.assert_close(model(tokens, cache=cache), model(tokens))


def test_a_dense_model_checks_the_names_it_does_not_need() -> None:
    with pytest.raises(ConfigError, match="moe_impl: expected one of"):
        build_model(LLAMA, moe_impl="other")
    with pytest.raises(ConfigError, match="router_dtype: expected one of"):
        build_model(LLAMA, router_dtype="other")
