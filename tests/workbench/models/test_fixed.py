"""Decoding over fixed buffers: the same tokens and records as pass by pass, and a step that a graph could hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.taping import OnDevice, Tape, taped
from workbench.errors import ConfigError, HookError, InterventionError, WorkbenchError
from workbench.interventions import AddVector, ForceExperts, Interventions, KernelBuffers, KnockOut, ScaleExperts, Where
from workbench.io.weights import load_model
from workbench.models import Llama, build_model, fixed, init_weights
from workbench.models.recording import FLUSH, Recorder
from workbench_kernels import Intervene

LAYER = 3
NEW = FLUSH + 9  # records are compacted once on the way


def load(name: str) -> Llama:
    return load_model(name, dtype="float64", moe_impl="reference")


@pytest.fixture(scope="module")
def dense() -> Llama:
    return load("nano-dense-thinking")


@pytest.fixture(scope="module")
def moe() -> Llama:
    return load("nano-moe-thinking")


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request: pytest.FixtureRequest) -> Llama:
    return request.getfixturevalue(request.param)


@pytest.fixture
def n_captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets decode="graph" run here: a tape takes the place of the graph."""
    count: list[int] = []

    def capture(step: Callable[[], None]) -> Callable[[], object]:
        count.append(1)
        return taped(step)

    monkeypatch.setattr(fixed, "capture", capture)
    monkeypatch.setattr(fixed, "_check_graph", lambda model: None)
    return count


@pytest.fixture
def prompts() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(400, 2000, (3, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    mask[0, :4], mask[2, :1] = 0, 0
    return tokens, mask


@pytest.mark.parametrize("decode", ["buffers", "graph"])
def test_the_same_tokens_and_records_as_pass_by_pass(
    model: Llama, prompts: tuple[Tensor, Tensor], decode: str, n_captured: list[int]
) -> None:
    record = ["routing", "resid_post", "rot_k", "ln_final.hook_normalized"][not model.cfg.is_moe :]
    options = {"max_new_tokens": NEW, "record": record, "stop_ids": (), "prefill_chunk": 4}
    plain = model.generate(*prompts, **options)
    out = model.generate(*prompts, cache="static", decode=decode, **options)
    assert (out.decode, plain.decode, len(n_captured)) == (decode, "plain", decode == "graph")
    assert torch.equal(out.tokens, plain.tokens)
    assert torch.equal(out.attention_mask, plain.attention_mask)
    real = plain.attention_mask.bool()
    both = plain.record.activations | plain.record.routing, out.record.activations | out.record.routing
    assert both[0].keys() == both[1].keys()
    for name, expected in both[0].items():
        torch.testing.assert_close(both[1][name][real], expected[real], rtol=1e-6, atol=1e-8, equal_nan=True)


def test_rows_end_each_at_its_own_stop(model: Llama, prompts: tuple[Tensor, Tensor], n_captured: list[int]) -> None:
    free = model.generate(*prompts, max_new_tokens=20, stop_ids=())
    stops = (int(free.tokens[0, -16]), int(free.tokens[1, -9]))
    options = {"max_new_tokens": 20, "stop_ids": stops}
    plain, out = (
        model.generate(*prompts, **options),
        model.generate(*prompts, cache="static", decode="graph", **options),
    )
    assert torch.equal(out.tokens, plain.tokens)
    assert out.stopped == plain.stopped
    assert "stop_id" in out.stopped


def test_every_way_of_choosing_works(moe: Llama, prompts: tuple[Tensor, Tensor], n_captured: list[int]) -> None:
    texts: dict[str, list[tuple[int, str]]] = {"plain": [], "graph": []}
    options = {
        "max_new_tokens": 24,
        "temperature": 1.2,
        "top_p": 0.9,
        "top_k": 40,
        "repetition_penalty": 1.2,
        "seed": 5,
    }
    out = {
        how: moe.generate(
            *prompts,
            **options,
            cache="static",
            decode=how,
            on_text=lambda row, text, how=how: texts[how].append((row, text)),
        )
        for how in texts
    }
    assert torch.equal(out["plain"].tokens, out["graph"].tokens)
    assert texts["plain"] == texts["graph"] != []


@pytest.mark.parametrize("where", [Where(), Where(phase="decode"), Where(positions=(14, 15, 16))])
def test_interventions_of_the_kernels_act(
    moe: Llama, prompts: tuple[Tensor, Tensor], where: Where, n_captured: list[int]
) -> None:
    items = [KnockOut(experts=tuple(range(16)), mode="reroute", where=where)]
    options = {"max_new_tokens": 12, "stop_ids": (), "cache": "static", "interventions": items}
    plain, out = moe.generate(*prompts, **options), moe.generate(*prompts, decode="graph", **options)
    assert torch.equal(out.tokens, plain.tokens)
    assert not torch.equal(out.tokens, moe.generate(*prompts, max_new_tokens=12, stop_ids=()).tokens)


def buffers(moe: Llama) -> Intervene:
    """Of every kind, none of which changes anything yet."""
    n_experts, wide = moe.cfg.n_experts, torch.float64
    return Intervene(
        router_bias=torch.zeros(n_experts, dtype=wide),
        keep_mask=torch.ones(n_experts, dtype=torch.bool),
        expert_scale=torch.ones(n_experts, dtype=wide),
        expert_add=torch.zeros(n_experts, moe.cfg.d_model, dtype=wide),
    )


CHANGES = {
    "router_bias": lambda change: change.router_bias[4:9].fill_(9.0),
    "keep_mask": lambda change: change.keep_mask[:20].fill_(False),
    "expert_scale": lambda change: change.expert_scale.fill_(-3.0),
    "expert_add": lambda change: change.expert_add.add_(torch.linspace(-9, 9, change.expert_add.shape[1])),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_written_into_a_buffer_acts_from_the_next_step_without_another_capture(
    moe: Llama, prompts: tuple[Tensor, Tensor], name: str, n_captured: list[int]
) -> None:
    def run(decode: str, change_at: int | None) -> Tensor:
        given = [buffers(moe) for _ in range(moe.cfg.n_layers)]
        seen: list[int] = []

        def watch(row: int, text: str) -> None:
            seen.append(row)
            if len(seen) == change_at:
                for one in given:
                    CHANGES[name](one)

        held = KernelBuffers(dict(enumerate(given)))
        options = {"max_new_tokens": 12, "stop_ids": (), "cache": "static", "interventions": held}
        return moe.generate(prompts[0][1:2], decode=decode, on_text=watch, **options).tokens

    changed, untouched = run("graph", 6), run("graph", None)
    assert len(n_captured) == 2, "one capture for each generation"
    assert torch.equal(changed, run("plain", 6))
    assert torch.equal(untouched, run("plain", None))
    assert torch.equal(untouched, moe.generate(prompts[0][1:2], max_new_tokens=12, stop_ids=()).tokens)
    assert not torch.equal(changed, untouched)


def test_buffers_mean_what_the_values_mean(moe: Llama, prompts: tuple[Tensor, Tensor]) -> None:
    k, experts, where = moe.cfg.k, (1, 5, 9), Where(layers=(LAYER,))
    keep, scale = buffers(moe).keep_mask, buffers(moe).expert_scale
    keep[list(experts)], scale[list(experts)] = False, 0.5
    weights = 0.5 ** torch.arange(k, dtype=torch.float64)  # float32 holds them exactly
    pairs = [
        (Intervene(keep_mask=keep), KnockOut(experts=experts, mode="reroute", where=where)),
        (Intervene(expert_scale=scale), ScaleExperts(experts=experts, factor=0.5, where=where)),
        (
            Intervene(forced_ids=torch.arange(k)[None], forced_weights=weights[None]),
            ForceExperts(experts=tuple(range(k)), weights=tuple(weights.tolist()), where=where),
        ),
    ]
    clean = moe(*prompts)
    for change, value in pairs:
        given = moe(*prompts, interventions=KernelBuffers({LAYER: change}))
        assert torch.equal(given, moe(*prompts, interventions=[value])), value
        assert not torch.equal(given, clean), value
    assert torch.equal(moe(*prompts), clean), "nothing stays attached"


def wrong_buffers(moe: Llama) -> dict[str, KernelBuffers]:
    per_token = torch.ones(4, moe.cfg.n_experts, dtype=torch.bool)
    return {
        "got 99": KernelBuffers({99: buffers(moe)}),
        "got one for each token": KernelBuffers({LAYER: Intervene(keep_mask=per_token)}),
        "got replace_experts": KernelBuffers({LAYER: Intervene(replace_experts=per_token[0])}),
        "expert_scale: expected": KernelBuffers({LAYER: Intervene(expert_scale=torch.ones(3))}),
        "got KnockOut": KernelBuffers({LAYER: KnockOut(experts=(1,), mode="drop")}),  # type: ignore[dict-item]
    }


@pytest.mark.parametrize(
    "message", ["got 99", "got one for each", "got replace_experts", "expert_scale: ", "got KnockOut"]
)
def test_buffers_that_do_not_fit_are_refused(moe: Llama, message: str) -> None:
    given = next(value for key, value in wrong_buffers(moe).items() if key.startswith(message))
    with pytest.raises(InterventionError, match=message):
        moe(torch.tensor([[5, 6]]), interventions=given)


def test_buffers_beside_another_intervention_on_the_same_experts_are_refused(moe: Llama) -> None:
    held = KernelBuffers({LAYER: buffers(moe)})
    with moe.intervene(held), pytest.raises(InterventionError, match="got knock_out"):
        moe(torch.tensor([[5, 6]]), interventions=[KnockOut(experts=(1,), mode="reroute")])
    with moe.intervene(held), pytest.raises(InterventionError, match="no buffers yet"):
        moe(torch.tensor([[5, 6]]), interventions=held)
    assert all(block.mlp.kernel_buffers is None for block in moe.blocks)


def test_an_intervention_that_is_a_hook_is_refused_in_a_graph(moe: Llama, n_captured: list[int]) -> None:
    item = AddVector(vector=torch.ones(moe.cfg.d_model), where=Where(layers=(1,)))
    options = {"max_new_tokens": 4, "cache": "static", "interventions": [item], "stop_ids": ()}
    tokens = torch.tensor([[5, 6]])
    with pytest.raises(InterventionError, match=r"got add_vector \(not part of the experts' kernels\)"):
        moe.generate(tokens, decode="graph", **options)
    assert torch.equal(moe.generate(tokens, decode="buffers", **options).tokens, moe.generate(tokens, **options).tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": "fast"}, "expected one of plain, buffers, graph, got 'fast'"),
        ({"decode": "buffers"}, "expected cache='static', got 'growing'"),
        ({"decode": "graph", "cache": "static"}, "expected a model on CUDA, got one on cpu"),
    ],
)
def test_what_cannot_run_is_an_error_and_no_other_way(dense: Llama, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dense.generate(torch.tensor([[5, 6]]), max_new_tokens=2, **options)


def refused(model: Llama, kind: type[WorkbenchError], message: str) -> None:
    with pytest.raises(kind, match=message):
        fixed.check_decode(model, "graph", "static")


def test_hooks_and_host_loops_are_refused_on_a_gpu(moe: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Llama, "device", torch.device("cuda"))
    fixed.check_decode(moe, "graph", "static")
    with moe.hooks([("blocks.1.hook_resid_post", lambda x, hook: None)]):
        refused(moe, HookError, "got some at blocks.1.hook_resid_post")
    with moe.intervene(Interventions([KnockOut(experts=(1,), mode="drop")], label=lambda ids: ["text"] * len(ids))):
        refused(moe, InterventionError, "without label")
    with moe.intervene([KnockOut(experts=(1,), mode="drop")]):
        fixed.check_decode(moe, "graph", "static")
    monkeypatch.setattr(moe, "_moe_impl", "sorted")
    refused(moe, ConfigError, "got 'sorted'")


@pytest.mark.parametrize("impl", ["grouped_mm", "reference"])
@pytest.mark.parametrize("router_dtype", ["float32", "model"])
def test_a_step_waits_for_nothing_and_repeats_itself(moe: Llama, impl: str, router_dtype: str) -> None:
    """On the meta device no value exists, so that whatever waits for one raises, as would what comes from the host."""
    model = build_model(moe.cfg, device="meta", dtype=torch.bfloat16, moe_impl=impl, router_dtype=router_dtype)
    recorder = Recorder(model, ["routing", "resid_post"])
    change = replace(
        buffers(moe),
        forced_ids=torch.zeros(1, moe.cfg.k, dtype=torch.int64),
        forced_weights=torch.ones(1, moe.cfg.k),
    )
    on_device = Intervene(**{name: getattr(change, name).to("meta") for name in change.active})
    cache = model.new_cache(3, 20)
    cache.n_seen = 5
    with torch.inference_mode(), recorder.listening(), model.intervene(KernelBuffers({LAYER: on_device})):
        passes = fixed.FixedPasses(model, cache, recorder, graph=False)
        passes.decode(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, dtype=torch.bool))
        shapes = []
        for _ in range(2):
            with Tape() as tape, OnDevice():
                passes._step()
            shapes.append(tape.shapes())
    assert len(shapes[0]) > 300
    assert shapes[0] == shapes[1]


def test_the_check_sees_a_wait(moe: Llama) -> None:
    """`sorted` asks the device which experts were hit: the same step with it must not pass."""
    model = build_model(moe.cfg, device="meta", moe_impl="sorted")
    cache = model.new_cache(3, 20)
    cache.n_seen = 5
    passes = fixed.FixedPasses(model, cache, None, graph=False)
    with torch.inference_mode(), pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        passes.decode(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, dtype=torch.bool))


@pytest.mark.gpu
@pytest.mark.parametrize("moe_impl", ["grouped_mm", "reference", "triton"])
def test_a_captured_step_equals_the_step_as_it_is(moe: Llama, prompts: tuple[Tensor, Tensor], moe_impl: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = init_weights(build_model(moe.cfg, device="cuda", dtype=torch.bfloat16, moe_impl=moe_impl), seed=0, std=0.05)
    options = {"max_new_tokens": NEW, "record": ["routing", "resid_post"], "stop_ids": (), "cache": "static"}
    held = KernelBuffers({LAYER: Intervene(keep_mask=torch.arange(moe.cfg.n_experts, device="cuda") >= 8)})
    for interventions in ((), held):
        as_is = model.generate(*prompts, decode="buffers", interventions=interventions, **options)
        out = model.generate(*prompts, decode="graph", interventions=interventions, **options)
        assert torch.equal(out.tokens, as_is.tokens)
        assert torch.equal(out.record.routing["expert_ids"], as_is.record.routing["expert_ids"])
        for name, expected in as_is.record.activations.items():
            assert torch.equal(out.record.activations[name], expected), name
