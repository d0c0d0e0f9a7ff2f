"""Causal tracing finds the planted path, restores what it says, and continues after a kill."""

from __future__ import annotations

import polars as pl
import pytest
import torch

from workbench.errors import ConfigError, ShapeError
from workbench.experiments.metrics import log_probability, logit_difference
from workbench.experiments.tracing import causal_tracing
from workbench.planted.mechanisms import writing_mlp


@pytest.fixture(scope="module")
def traced():
    planted = writing_mlp("qwen3_moe")
    spans = [(planted.subject_pos, planted.subject_pos + 1)] * len(planted.clean)
    metric = logit_difference(planted.correct, planted.wrong)
    experts = [(planted.writer_layer, planted.experts[0]), (planted.writer_layer, planted.experts[0] + 1)]
    result = causal_tracing(
        planted.model, planted.clean, spans, metric, experts=experts, n_samples=6, progress=False
    )  # fmt: skip
    return planted, result


def recovered(result, **where):
    frame = result.frame.filter(*(pl.col(name) == value for name, value in where.items()))
    return frame["recovered"].mean()


def test_noise_hurts_and_the_planted_path_restores(traced):
    planted, result = traced
    assert all(
        clean > blurred + 0.5
        for clean, blurred in zip(result.settings["clean"], result.settings["blurred"], strict=True)
    )
    subject, query, head, writer = planted.subject_pos, planted.query_pos, planted.head_layer, planted.writer_layer
    assert recovered(result, component="resid_post", layer=head - 1, pos=subject) == pytest.approx(1, abs=0.05)
    assert recovered(result, component="resid_post", layer=writer, pos=query) == pytest.approx(1, abs=0.05)
    assert recovered(result, component="attn_out", layer=head, pos=query) > 0.9
    assert recovered(result, component="mlp_out", layer=writer, pos=query) > 0.9


def test_random_sites_restore_nothing(traced):
    planted, result = traced
    elsewhere = result.frame.filter(~pl.col("pos").is_in([planted.subject_pos, planted.query_pos]))
    assert (
        elsewhere.group_by("component", "layer", "pos").agg(pl.col("recovered").mean().abs())["recovered"].max() < 0.02
    )
    assert abs(recovered(result, component="resid_post", layer=planted.head_layer - 1, pos=planted.query_pos)) < 0.05
    assert abs(recovered(result, component="mlp_out", layer=planted.head_layer, pos=planted.query_pos)) < 0.05


def test_the_writing_expert_is_told_from_its_neighbour(traced):
    planted, result = traced
    expert = planted.experts[0]
    assert recovered(result, component="expert", expert=expert, pos=planted.query_pos) > 0.9
    assert abs(recovered(result, component="expert", expert=expert + 1, pos=planted.query_pos)) < 0.05


def test_roles_and_columns(traced):
    planted, result = traced
    roles = result.frame.filter(pl.col("pair") == "0", pl.col("component") == "attn_out", pl.col("layer") == 0).sort(
        "pos"
    )["role"]
    n = planted.clean.shape[1]
    assert roles.to_list() == ["before"] * planted.subject_pos + ["last_subject"] + ["after"] * (
        n - planted.subject_pos - 2
    ) + ["last"]
    value = result.frame["value"] - result.frame["indirect"]
    blurred = result.frame.select("pair").join(
        pl.DataFrame({"pair": [str(i) for i in range(8)], "b": result.settings["blurred"]}),
        on="pair",
        maintain_order="left",
    )["b"]
    assert (value - blurred).abs().max() < 1e-3


def test_a_finished_trace_is_opened_and_a_partial_one_continued(tmp_path):
    planted = writing_mlp("llama")
    span = [(planted.subject_pos, planted.subject_pos + 1)] * 2

    def run(out=None):
        return causal_tracing(
            planted.model, planted.clean[:2], span, log_probability(planted.correct), components=["mlp_out"],
            n_samples=2, window=3, out=out, progress=False,
        ).frame  # fmt: skip

    whole = run()
    assert run(tmp_path / "trace").equals(whole)
    (tmp_path / "trace" / "result.parquet").unlink()
    assert run(tmp_path / "trace").equals(whole)


def test_padding_is_left_out_and_changes_nothing(nano):
    text = "フランスの首都は"
    tokens = nano.to_tokens(text)
    padded = torch.cat([torch.full((1, 2), 4), tokens], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 2).long()[None]
    with torch.no_grad():
        answer = nano(tokens)[0, -1].argmax()
    options = {"components": ["resid_post"], "progress": False, "n_samples": 2}
    plain = causal_tracing(nano, tokens, [(1, 3)], log_probability(answer), noise=1e-6, **options).frame
    shifted = causal_tracing(
        nano, padded, [(3, 5)], log_probability(answer), noise=1e-6, attention_mask=mask, **options
    ).frame
    assert len(plain) == len(shifted)
    assert shifted["pos"].min() == 2
    torch.testing.assert_close(plain["value"].to_torch(), shifted["value"].to_torch(), atol=1e-3, rtol=1e-3)


def test_wrong_requests_are_refused(llama, tokens):
    metric = logit_difference(7, 9)
    with pytest.raises(ShapeError, match="subject: expected columns"):
        causal_tracing(llama, tokens, [(2, 2), (0, 1)], metric)
    with pytest.raises(ShapeError, match="one for each of 2"):
        causal_tracing(llama, tokens, [(0, 1)], metric)
    with pytest.raises(ConfigError, match="components: expected"):
        causal_tracing(llama, tokens, [(0, 1)] * 2, metric, components=["z"])
    with pytest.raises(ConfigError, match="experts: expected"):
        causal_tracing(llama, tokens, [(0, 1)] * 2, metric, experts=[(0, 1)])
    with pytest.raises(ConfigError, match="positive"):
        causal_tracing(llama, tokens, [(0, 1)] * 2, metric, noise=0)
