"""Frames recorded from transformers' Qwen3-MoE equal our own capture of the same checkpoint."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from workbench.axes import ROUTING_COLUMNS
from workbench.capture import capture_routing, pad
from workbench.errors import ConfigError, RunError, ShapeError

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

from workbench.interop.transformers import attach  # noqa: E402

SEQUENCES = [[1, *range(300, 320)], [1, *range(500, 507)], [1, 900]]


@pytest.fixture(scope="module")
def hf_model(nano):
    return transformers.Qwen3MoeForCausalLM.from_pretrained(nano.source, dtype=torch.float32).eval()


def own_frame(model, sequences):
    doc_ids = [str(number) for number, sequence in enumerate(sequences) for _ in sequence]
    pos = [place for sequence in sequences for place in range(len(sequence))]
    return capture_routing(model, sequences).frame(doc_ids, pos)


def assert_same(found, expected):
    assert found.columns == list(ROUTING_COLUMNS) == expected.columns
    assert found.schema == expected.schema
    exact = ["doc_id", "pos", "layer", "expert_ids"]
    assert found.select(exact).equals(expected.select(exact))
    for name in ("routing_weights", "router_entropy", "router_margin"):
        values = [np.array(frame[name].to_list(), dtype=float) for frame in (found, expected)]
        np.testing.assert_allclose(*values, atol=2e-5)


@pytest.mark.parametrize("left", [True, False])
def test_padded_batch_gives_the_frames_of_our_own_capture(nano, hf_model, left):
    tokens, mask = pad(SEQUENCES, left=left)
    with torch.no_grad(), attach(hf_model) as recorder:
        # transformers counts padding as positions unless told; ours does not
        hf_model(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    assert_same(recorder.frame(), own_frame(nano, SEQUENCES))


def test_passes_add_up_and_stop_when_detached(nano, hf_model):
    with torch.no_grad(), attach(hf_model) as recorder:
        for sequence in SEQUENCES:
            hf_model(torch.tensor([sequence]))
    hf_model(torch.tensor([[1, 2, 3]]))
    assert_same(recorder.frame(), own_frame(nano, SEQUENCES))
    named = recorder.frame(["a", "b", "c"])
    assert named["doc_id"].unique(maintain_order=True).to_list() == ["a", "b", "c"]
    with pytest.raises(ShapeError, match="each of 3 sequences"):
        recorder.frame(["a"])
    recorder.clear()
    with pytest.raises(RunError, match="got none"):
        recorder.frame()


def test_generation_records_what_was_fed_and_stops_at_the_end_token(nano, hf_model):
    tokens, mask = pad(SEQUENCES, left=True)
    free = hf_model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    end = int(free[1, tokens.shape[1] + 1])  # the second token that sequence 1 writes shall end it
    hf_model.generation_config.eos_token_id = [end]
    try:
        with attach(hf_model) as recorder:
            out = hf_model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=4)
    finally:
        hf_model.generation_config.eos_token_id = 2
    written = out[:, tokens.shape[1] :].tolist()
    assert written[1][1] == end
    assert set(written[1][2:]) == {4}
    fed = []
    for sequence, new in zip(SEQUENCES, written, strict=True):
        kept = new[: new.index(end) + 1] if end in new else new
        fed.append(sequence + kept[: len(new) - 1])  # the last step's token is never fed
    assert_same(recorder.frame(), own_frame(nano, fed))


def test_the_analyses_take_the_frames(hf_model):
    with torch.no_grad(), attach(hf_model) as recorder:
        hf_model(torch.tensor([SEQUENCES[0]]))
    slots = recorder.frame().explode("expert_ids", "routing_weights")
    assert slots.group_by("layer").agg(pl.len())["len"].to_list() == [len(SEQUENCES[0]) * 4] * 6


def test_what_cannot_be_recorded_is_refused(nano_dense, hf_model):
    dense = transformers.LlamaForCausalLM.from_pretrained(nano_dense.source)
    with pytest.raises(ConfigError, match="Qwen3MoeForCausalLM"):
        attach(dense)
    with attach(hf_model), pytest.raises(ShapeError, match="attention_mask: expected"):
        hf_model(torch.tensor([[1, 2, 3]]), attention_mask=torch.ones(1, 1, 3, 3))


def test_a_pass_that_fails_midway_leaves_no_trace(nano, hf_model):
    def fail(*_):
        raise RuntimeError("halfway")

    with torch.no_grad(), attach(hf_model) as recorder:
        hf_model(torch.tensor([SEQUENCES[0]]))
        handle = hf_model.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="halfway"):
            hf_model(torch.tensor([SEQUENCES[1]]))
        handle.remove()
        for sequence in SEQUENCES[1:]:
            hf_model(torch.tensor([sequence]))
    assert_same(recorder.frame(), own_frame(nano, SEQUENCES))


def test_beam_search_is_refused_and_leaves_no_trace(nano, hf_model):
    tokens = torch.tensor([SEQUENCES[1]])
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), attach(hf_model) as recorder:
        hf_model(torch.tensor([SEQUENCES[0]]))
        with pytest.raises(RunError, match=r"got beam search.*num_beams=1, or detach first"):
            hf_model.generate(tokens, **options)
        hf_model(tokens)
    assert_same(recorder.frame(), own_frame(nano, SEQUENCES[:2]))
    with torch.no_grad():
        assert hf_model.generate(tokens, **options).shape[1] > tokens.shape[1]


def test_a_cache_may_be_reordered_after_recording(hf_model):
    cache = transformers.DynamicCache(config=hf_model.config)
    with torch.no_grad(), attach(hf_model):
        hf_model(torch.tensor([[1, 300], [1, 301]]), past_key_values=cache)
    before = cache.layers[0].keys.clone()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].keys, before.flip(0))
