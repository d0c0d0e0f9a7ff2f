"""What is recorded while writing equals a teacher-forced pass over what was written."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch
from torch import Tensor

from workbench.axes import ROUTING_COLUMNS
from workbench.capture import capture_routing
from workbench.chat import render
from workbench.errors import ConfigError, HookError, InterventionError, ShapeError
from workbench.hooks import HookPoint
from workbench.interventions import AddVector, KnockOut, ScaleActivation, Where
from workbench.io.weights import load_model
from workbench.models import Generation, Llama, Qwen3Moe
from workbench.models.recording import open_record
from workbench.transcript import rows_of
from workbench_kernels import experts

PROMPTS = [
    render([{"role": "user", "content": "2足す3はいくつですか。"}], date="2026-04-03"),
    render([{"role": "user", "content": "What is 4 plus 1?"}], date="2026-04-03", effort="low"),
    "海は",
]
POINTS = ["blocks.3.hook_resid_post", "router_logits", "attn.hook_z", "mlp.hook_expert_out"]


@pytest.fixture(scope="module")
def nano() -> Llama:
    return load_model("nano-moe-thinking", dtype="float32")


@pytest.fixture(scope="module")
def prompts(nano: Llama) -> tuple[Tensor, Tensor]:
    rows = [nano.tokenizer.to_tokens(text, bos=False) for text in PROMPTS]
    width = max(map(len, rows))
    tokens = torch.tensor([[4] * (width - len(row)) + row for row in rows])
    return tokens, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


@pytest.fixture(scope="module")
def written(nano: Llama, prompts: tuple[Tensor, Tensor]) -> Generation:
    return nano.generate(*prompts, max_new_tokens=80, record=["routing", *POINTS])


def test_the_rows_end_at_different_steps(written: Generation) -> None:
    lengths = [len(ids) for ids in written.continuations()]
    assert len(set(lengths)) > 1
    assert "stop_id" in written.stopped


def test_recording_changes_no_token(nano: Llama, prompts: tuple[Tensor, Tensor], written: Generation) -> None:
    assert torch.equal(nano.generate(*prompts, max_new_tokens=80).tokens, written.tokens)


def test_routing_equals_a_pass_over_the_whole_sequences(nano: Llama, written: Generation) -> None:
    rows = rows_of(written)
    names = [f"doc-{row}" for row in range(len(rows))]
    forced = capture_routing(nano, rows)
    expected = forced.frame(
        [name for name, ids in zip(names, rows, strict=True) for _ in ids],
        [pos for ids in rows for pos in range(len(ids))],
    )
    found = written.routing(names)
    assert found.columns == list(ROUTING_COLUMNS)
    assert found.schema == expected.schema
    keys = ["doc_id", "pos", "layer", "expert_ids"]
    assert found.select(keys).equals(expected.select(keys))
    for column in ("router_entropy", "router_margin"):
        assert float((found[column] - expected[column]).abs().max()) < 2e-4  # type: ignore[arg-type]
    weights = (found["routing_weights"].explode() - expected["routing_weights"].explode()).abs()
    assert float(weights.max()) < 1e-4  # type: ignore[arg-type]


def test_activations_equal_a_pass_over_the_whole_sequences(nano: Llama, written: Generation) -> None:
    names = list(written.record.activations)
    assert len(names) == 1 + 3 * nano.cfg.n_layers
    for row, ids in enumerate(rows_of(written)):
        _, cache = nano.run_with_cache(torch.tensor([ids]), names_filter=names)
        kept = written.attention_mask[row].bool()
        for name in names:
            found = written.record.activations[name][row, kept]
            assert (found - cache[name][0]).abs().max() < 2e-4 * max(1.0, float(cache[name].abs().max())), name


def test_tokens_carry_phase_position_and_segment(written: Generation) -> None:
    frame = written.token_frame()
    first = frame.filter(pl.col("doc_id") == "row-0")
    assert first["pos"].to_list() == list(range(len(first)))
    decoded = first.filter(pl.col("phase") == "decode")
    assert decoded["token_id"].to_list() == written.continuations()[0]
    assert set(decoded["segment"]) == {"analysis", "final", "control"}
    assert set(first.filter(pl.col("phase") == "prefill")["segment"]) == {"system", "user", "control"}
    joined = written.routing().join(frame, on=["doc_id", "pos"])
    assert len(joined) == len(written.routing())
    assert [message.channel for message in written.messages()[0]] == [None, None, "analysis", "final"]


def test_a_record_on_disk_is_the_one_in_memory(
    nano: Llama, prompts: tuple[Tensor, Tensor], written: Generation, tmp_path: Path
) -> None:
    record = ["routing", *POINTS]
    out = nano.generate(*prompts, max_new_tokens=80, record=record, record_to=tmp_path / "here", prefill_chunk=7)
    assert torch.equal(out.tokens, written.tokens)
    assert out.routing().select("expert_ids").equals(written.routing().select("expert_ids"))
    again = open_record(tmp_path / "here")
    assert again.routed_layers == written.record.routed_layers
    kept = written.attention_mask.bool()
    for name, values in written.record.activations.items():
        torch.testing.assert_close(again.activations[name][kept], values[kept], rtol=1e-3, atol=1e-4)
    with pytest.raises(ConfigError, match="record_to: expected a folder without a record"):
        nano.generate(*prompts, max_new_tokens=2, record=record, record_to=tmp_path / "here")
    with pytest.raises(ConfigError, match=r"expected a finished record, got no record\.json"):
        open_record(tmp_path)


def test_what_is_recorded_is_the_outcome_of_interventions(nano: Llama, prompts: tuple[Tensor, Tensor]) -> None:
    gone = KnockOut(experts=(3,), mode="reroute", where=Where(layers=(0,), phase="decode"))
    out = nano.generate(*prompts, max_new_tokens=12, record=["routing"], interventions=[gone])
    used = out.routing().join(out.token_frame(), on=["doc_id", "pos"]).explode("expert_ids")
    in_phase = dict(
        used.filter((pl.col("layer") == 0) & (pl.col("expert_ids") == 3)).group_by("phase").len().iter_rows()
    )
    assert "decode" not in in_phase
    assert in_phase["prefill"] > 0


def test_edits_in_place_by_later_hooks_do_not_reach_the_record(moe: Qwen3Moe, tokens: Tensor) -> None:
    expected = moe.generate(tokens, max_new_tokens=1, stop_ids=(), record=["blocks.0.hook_resid_post"])

    def spoil(x: Tensor, hook: HookPoint) -> None:
        x.mul_(0)

    with moe.hooks([("blocks.1.hook_resid_pre", spoil)]):
        out = moe.generate(tokens, max_new_tokens=1, stop_ids=(), record=["blocks.0.hook_resid_post"])
    name = "blocks.0.hook_resid_post"
    assert torch.equal(out.record.activations[name][:, :7], expected.record.activations[name][:, :7])


def test_interventions_that_edit_in_place_do_not_reach_what_was_recorded_before(
    moe: Qwen3Moe, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AddVector, "_edit", lambda self, x, site: x.mul_(0.5))
    halve = AddVector(vector=torch.ones(moe.cfg.d_model), point="resid_pre", where=Where(layers=(1,)))
    point = "blocks.0.hook_resid_post"  # the same storage as resid_pre of layer 1
    out = moe.generate(tokens, max_new_tokens=2, stop_ids=(), interventions=[halve], record=[point])
    plain = moe.generate(tokens, max_new_tokens=2, stop_ids=(), record=[point])
    n_prompt = tokens.shape[1]
    assert torch.equal(out.record.activations[point][:, :n_prompt], plain.record.activations[point][:, :n_prompt])


def test_recorded_tensors_may_be_trained_on(moe: Qwen3Moe, tokens: Tensor) -> None:
    out = moe.generate(tokens, max_new_tokens=3, stop_ids=(), record=["resid_post"])
    values = out.record.activations["blocks.0.hook_resid_post"]
    assert values.shape == (2, 10, 32), "the last token written is recorded too"
    probe = torch.nn.Linear(32, 1)
    probe(values).sum().backward()
    assert probe.weight.grad is not None


def test_hooks_of_the_caller_receive_tensors_that_may_be_trained_on(llama: Llama, tokens: Tensor) -> None:
    kept: list[Tensor] = []
    with llama.hooks([("blocks.0.hook_resid_post", lambda x, hook: kept.append(x))]):
        llama.generate(tokens, max_new_tokens=2, stop_ids=())
    probe = torch.nn.Linear(32, 1)
    probe(kept[0]).sum().backward()
    assert probe.weight.grad is not None


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ("routing", HookError, "record: expected a list such as"),
        (["resid_pots"], HookError, "Did you mean"),
        (
            ["expert_load"],
            HookError,
            r"record: expected points with axes batch pos, got blocks\.0\.mlp\.hook_expert_load",
        ),
        (["routng"], HookError, "record: expected a known one, got 'routng'. Did you mean routing"),
    ],
)
def test_what_cannot_be_recorded_is_named(
    moe: Qwen3Moe, tokens: Tensor, record: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        moe.generate(tokens, max_new_tokens=2, record=record)


def test_where_nothing_can_be_written_is_one_error(moe: Qwen3Moe, tokens: Tensor, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="record_to: expected a folder to write to"):
        moe.generate(tokens, max_new_tokens=2, record=["routing"], record_to=tmp_path / "file")
    with pytest.raises(ShapeError, match="record_to: expected something to record beside it"):
        moe.generate(tokens, max_new_tokens=2, record_to=tmp_path / "records")
    with pytest.raises(ShapeError, match="on_text: expected a function"):
        moe.generate(tokens, max_new_tokens=2, on_text=3)
    with pytest.raises(ShapeError, match="so that one can be written"):
        moe.generate(torch.full((1, moe.cfg.n_ctx), 5))


def test_logits_without_a_number_are_an_error_and_no_token(nano: Llama) -> None:
    wild = [ScaleActivation(factor=1e38, point="ln_final.hook_normalized", where=Where(phase="decode"))]
    for temperature in (0.0, 1.0):
        with pytest.raises(InterventionError, match="logits: expected finite numbers"):
            nano.generate(torch.tensor([[1, 500, 600]]), max_new_tokens=5, interventions=wild, temperature=temperature)


def test_a_hook_may_ban_tokens(nano: Llama) -> None:
    def ban(module: torch.nn.Module, inputs: object, logits: Tensor) -> Tensor:
        return logits.masked_fill(torch.arange(logits.shape[-1]) < 2000, -torch.inf)

    handle = nano.unembed.register_forward_hook(ban)
    try:
        for temperature in (0.0, 1.0):
            out = nano.generate(
                torch.tensor([[1, 500, 600]]), max_new_tokens=4, stop_ids=(), temperature=temperature, seed=0
            )
            assert int(out.tokens[0, 3:].min()) >= 2000
    finally:
        handle.remove()


def test_the_experts_lie_ready_while_it_writes_and_not_after(nano: Llama) -> None:
    kept: list[int] = []
    with nano.hooks([("hook_embed", lambda x, hook: kept.append(len(experts._KEPT)))]):
        nano.generate(torch.tensor([[1, 500, 600]]), max_new_tokens=2, stop_ids=())
    assert kept == [2 * nano.cfg.n_layers] * 2
    assert not experts._KEPT


def test_a_dense_model_has_no_routing(llama: Llama, tokens: Tensor) -> None:
    with pytest.raises(ConfigError, match="record: expected a model with experts for 'routing'"):
        llama.generate(tokens, max_new_tokens=2, record=["routing"])
    out = llama.generate(tokens, max_new_tokens=2)
    with pytest.raises(ConfigError, match="routing: expected a generation that recorded it"):
        out.routing()
    with pytest.raises(ConfigError, match="token_frame: expected a model with a tokenizer"):
        out.token_frame()
    nano_like = Generation(torch.ones(3, 2).long(), torch.ones(3, 2).long(), 1, tokenizer=object())
    with pytest.raises(ShapeError, match="doc_id: expected 3 different names"):
        nano_like.token_frame(["a", "a", "b"])
