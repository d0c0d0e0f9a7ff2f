"""Patching finds planted causes and not their neighbours, and equals plain hooks on transformers' model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from closeness import near
from torch import Tensor

from workbench.errors import RunError, ShapeError
from workbench.experiments.metrics import kl, logit_difference
from workbench.experiments.pairs import Pairs
from workbench.experiments.patching import COMPONENTS, patch
from workbench.hooks import HookPoint
from workbench.interventions import KnockOut, Where
from workbench.models import Llama, Qwen3Moe
from workbench.planted.mechanisms import Mechanism, copying_head, deciding_route, writing_mlp

NANO = Path(__file__).resolve().parents[3] / "data" / "nano"
MECHANISMS: dict[str, Callable[[], Mechanism]] = {
    "head-llama": lambda: copying_head("llama"),
    "head-moe": lambda: copying_head("qwen3_moe"),
    "neuron": lambda: writing_mlp("llama"),
    "expert": lambda: writing_mlp("qwen3_moe"),
    "route": deciding_route,
}


@pytest.fixture(params=list(MECHANISMS))
def planted(request: pytest.FixtureRequest) -> Mechanism:
    return MECHANISMS[request.param]()


def expected(m: Mechanism, component: str, layer: int, head: int | None, pos: int) -> float:
    """How much of the answer one patch carries, from how the model was built."""
    if component.startswith("resid"):
        arrived = layer > m.head_layer or (layer == m.head_layer and component != "resid_pre")
        return float(pos == (m.query_pos if arrived else m.subject_pos))
    if component == "attn_out":
        return float((layer, pos) == (m.head_layer, m.query_pos))
    if component == "mlp_out":
        return float((layer, pos) == (m.writer_layer, m.query_pos))
    if component == "z":
        return float((layer, head, pos) == (m.head_layer, m.head, m.query_pos))
    if component == "v":
        return float((layer, head, pos) == (m.head_layer, m.kv_head, m.subject_pos))
    return 0.0  # where the head looks is the same in both versions


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_planted_causes_are_found_and_neighbours_are_not(planted: Mechanism, direction: str) -> None:
    m = planted
    result = patch(
        m.model, Pairs(m.clean, m.corrupt), logit_difference(m.correct, m.wrong), list(COMPONENTS),
        direction=direction, progress=False,
    )  # fmt: skip
    means = result.mean("recovered", by=["component", "layer", "head", "pos"])
    assert len(means) == 4 * 8 * (5 + 4 + 4 + 2 + 2), "layers x positions x (whole components, heads of q z, of k v)"
    for component, layer, head, pos, mean, *_ in means.iter_rows():
        found = mean if direction == "denoise" else 1 - mean
        assert found == pytest.approx(expected(m, component, layer, head, pos), abs=0.01), (component, layer, head, pos)


def test_the_frame_is_tidy_and_says_how_it_was_made(planted: Mechanism) -> None:
    m = planted
    pairs = Pairs(m.clean, m.corrupt, names=[f"p{i}" for i in range(8)])
    result = patch(m.model, pairs, logit_difference(m.correct, m.wrong), ["z"], layers=[1], progress=False)
    assert result.frame.columns == ["component", "layer", "head", "pos", "pair", "value", "recovered"]
    assert len(result.frame) == 4 * 8 * 8
    assert not result.frame.select("layer", "head", "pos", "pair").is_duplicated().any()
    assert result.settings["metric"] == "logit_difference"
    assert result.settings["layers"] == [1]
    one = result.frame.filter((pl.col("head") == m.head) & (pl.col("pos") == m.query_pos))
    assert one["value"].to_list() == pytest.approx(result.settings["clean"], abs=1e-3)


def hf_patched(
    hf: Any, tokens: Tensor, source: Tensor, component: str, layer: int, head: int | None, pos: int
) -> Tensor:
    """One patch with plain PyTorch hooks; logits [pair pos d_vocab]."""
    block, size = hf.model.layers[layer], hf.config.head_dim
    place = slice(None) if head is None else slice(head * size, (head + 1) * size)
    modules = {"z": block.self_attn.o_proj, "resid_pre": block, "resid_post": block, "attn_out": block.self_attn,
               "mlp_out": block.mlp, "q": block.self_attn.q_proj, "k": block.self_attn.k_proj,
               "v": block.self_attn.v_proj}  # fmt: skip
    module, before = modules[component], component in ("z", "resid_pre")
    kept: list[Tensor] = []

    def put(x: Tensor) -> Tensor:
        if not kept:
            kept.append(x.clone())
            return x
        x = x.clone()
        x[:, pos, place] = kept[0][:, pos, place]
        return x

    def pre(_: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (put(inputs[0]), *inputs[1:])

    def post(_: object, __: object, output: Any) -> Any:
        return put(output) if isinstance(output, Tensor) else (put(output[0]), *output[1:])

    handle = module.register_forward_pre_hook(pre) if before else module.register_forward_hook(post)
    try:
        hf(source)
        return hf(tokens).logits
    finally:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("name", ["nano-moe-thinking", "nano-dense-thinking"])
@pytest.mark.parametrize("direction", ["denoise", pytest.param("noise", marks=pytest.mark.slow)])
def test_equal_to_one_hook_at_a_time_on_transformers_model(
    name: str, direction: str, nano: Llama, nano_dense: Llama
) -> None:
    transformers = pytest.importorskip("transformers")
    hf = transformers.AutoModelForCausalLM.from_pretrained(NANO / name, dtype=torch.float32).eval()
    model = nano if "moe" in name else nano_dense
    clean = torch.randint(300, 2800, (2, 5), generator=torch.Generator().manual_seed(0))
    corrupt = torch.randint(300, 2800, (2, 5), generator=torch.Generator().manual_seed(1))
    metric = logit_difference([400, 500], [600, 700])
    parts = ["resid_pre", "q", "k", "v", "z", "attn_out", "mlp_out", "resid_post"]
    ours = patch(
        model, Pairs(clean, corrupt), metric, parts, layers=[0, 4], direction=direction, progress=False
    ).frame.filter((pl.col("pos") > 1) & (pl.col("head").is_null() | pl.col("head").is_in([1, 3])))
    source, target = (clean, corrupt) if direction == "denoise" else (corrupt, clean)
    for (component, layer, head, pos), rows in ours.group_by("component", "layer", "head", "pos", maintain_order=True):
        theirs = hf_patched(hf, target, source, component, layer, head, pos)
        assert rows["value"].to_list() == near(metric(theirs), theirs), (component, layer, head, pos)


@torch.no_grad()
def test_any_metric_sees_the_pairs_of_one_patch_at_a_time(nano: Llama) -> None:
    clean, corrupt = torch.arange(300, 312).view(3, 4), torch.arange(400, 412).view(3, 4)
    shapes = set()

    def entropy(logits: Tensor) -> Tensor:
        shapes.add(tuple(logits.shape))
        return torch.special.entr(logits[:, -1].softmax(-1)).sum(-1)

    result = patch(nano, Pairs(clean, corrupt), entropy, layers=[2], progress=False)
    assert shapes == {(3, 4, nano.cfg.d_vocab)}
    reference = nano(clean)
    divergence = patch(nano, Pairs(clean, corrupt), kl(reference), layers=[0, 5], progress=False).frame
    assert (divergence["value"] > -1e-5).all()
    assert len(result.frame) == 4 * 3


@torch.no_grad()
def test_named_positions_align_prompts_of_several_lengths(nano: Llama) -> None:
    """Padded together they give what each gives alone; clean and corrupt may be read at different places."""
    rows = [torch.randint(300, 2800, (n,), generator=torch.Generator().manual_seed(n)) for n in (6, 4)]
    others = [torch.randint(300, 2800, (n,), generator=torch.Generator().manual_seed(9 + n)) for n in (6, 4)]
    pad = torch.full((2,), 4)
    positions = {"near": [-2, -2], "crossed": [(3, 1), (2, 0)]}
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    pairs = Pairs(
        torch.stack([rows[0], torch.cat([pad, rows[1]])]), torch.stack([others[0], torch.cat([pad, others[1]])]),
        mask, positions,
    )  # fmt: skip
    parts = ["resid_pre", "z", "mlp_out"]
    together = patch(nano, pairs, logit_difference(400, 500), parts, layers=[1, 4], progress=False).frame
    for number, (row, other) in enumerate(zip(rows, others, strict=True)):
        places = {label: [where[number]] for label, where in positions.items()}
        one = Pairs(row[None], other[None], positions=places)
        alone = patch(nano, one, logit_difference(400, 500), parts, layers=[1, 4], progress=False).frame
        mine = together.filter(pl.col("pair") == str(number))
        assert mine["value"].to_list() == pytest.approx(alone["value"].to_list(), abs=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("component", ["resid_post", "attn_out"])
def test_a_set_of_positions_is_patched_at_once(nano: Llama, component: str) -> None:
    clean, corrupt = (torch.randint(300, 2800, (2, 6), generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    places = {"first": [(1, 2), (0, 1)], "last": [-1, -1], "other": [3, 3]}
    pairs, metric = Pairs(clean, corrupt, positions=places), logit_difference(400, 500)
    sets = {"two": ["first", "last"]}
    table = patch(nano, pairs, metric, component, layers=[1, 3], together=sets, progress=False).frame
    for layer in (1, 3):
        name = f"blocks.{layer}.{COMPONENTS[component]}"
        _, cache = nano.run_with_cache(clean, names_filter=name)

        def put(x: Tensor, hook: HookPoint, cache: Mapping[str, Tensor] = cache) -> Tensor:
            x, new = x.clone(), cache[hook.name]
            x[0, [2, 5]], x[1, [1, 5]] = new[0, [1, 5]], new[1, [0, 5]]
            return x

        expected = metric(nano.run_with_hooks(corrupt, fwd_hooks=[(name, put)]))
        rows = table.filter(pl.col("layer") == layer, pl.col("pos") == "two")
        assert rows["value"].to_list() == pytest.approx(expected.tolist(), abs=2e-5)
    alone = patch(nano, pairs, metric, component, layers=[1, 3], progress=False).frame
    assert table.filter(pl.col("pos") != "two")["value"].to_list() == pytest.approx(alone["value"].to_list(), abs=2e-5)


@torch.no_grad()
def test_under_interventions_both_runs_and_every_patch_are_changed(moe: Qwen3Moe, tokens: Tensor) -> None:
    gone = KnockOut(experts=(1, 4), mode="reroute", where=Where(positions=(-1, 2)))
    pairs, metric = Pairs(tokens, tokens.flip(1)), logit_difference(40, 50)
    with moe.intervene(gone):
        frame = patch(moe, pairs, metric, ["resid_pre", "z"], layers=[0, 2], progress=False).frame
    _, cache = moe.run_with_cache(pairs.clean, interventions=[gone])
    for (component, layer, head, pos), rows in frame.group_by("component", "layer", "head", "pos"):
        name = f"blocks.{layer}.{COMPONENTS[str(component)]}"

        def put(x: Tensor, hook: HookPoint, pos: Any = pos, head: Any = head) -> Tensor:
            x, new = x.clone(), cache[hook.name]
            place = (slice(None), pos) if head is None else (slice(None), pos, head)
            x[place] = new[place]
            return x

        logits = moe.run_with_hooks(pairs.corrupt, fwd_hooks=[(name, put)], interventions=[gone])
        assert rows["value"].to_list() == near(metric(logits), logits)


@torch.no_grad()
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_versions_padded_differently_are_each_read_as_they_are_alone(nano: Llama, direction: str) -> None:
    """Between languages one version is longer: the patched run keeps its own padding, not the other's."""
    long, short = torch.arange(300, 306)[None], torch.arange(400, 404)[None]
    padded = torch.cat([torch.full((1, 2), 4), short], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    pairs = Pairs(long, padded, torch.ones_like(mask), {"s": [(4, 1)]}, corrupt_mask=mask)
    metric, point = logit_difference(700, 900), "blocks.2.hook_resid_pre"
    found = patch(nano, pairs, metric, layers=[2], direction=direction, progress=False).frame["value"].to_list()
    (source, there), (target, here) = [(long, 4), (short, 1)][:: 1 if direction == "denoise" else -1]
    _, cache = nano.run_with_cache(source, names_filter=[point])

    def put(x: Tensor, hook: HookPoint) -> Tensor:
        x = x.clone()
        x[:, here] = cache[point][:, there]
        return x

    logits = nano.run_with_hooks(target, fwd_hooks=[(point, put)])
    assert found == near(metric(logits), logits)


def test_patching_all_positions_gives_the_other_run(nano: Llama) -> None:
    pairs = Pairs(torch.arange(300, 306)[None], torch.arange(400, 406)[None])
    result = patch(nano, pairs, logit_difference(700, 900), ["resid_post"], all_positions=True, progress=False)
    (clean,), logits = result.settings["clean"], nano(pairs.clean)
    assert result.frame["value"].to_list() == near([clean] * 6, logits)
    assert set(result.frame["pos"]) == {"all"}


def test_a_killed_sweep_continues_and_refuses_another_model(planted: Mechanism, tmp_path: Path) -> None:
    m = planted
    pairs, metric = Pairs(m.clean, m.corrupt), logit_difference(m.correct, m.wrong)
    whole = patch(m.model, pairs, metric, progress=False)
    calls = []

    def dying(logits: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return metric.score(logits)

    with pytest.raises(KeyboardInterrupt):
        patch(m.model, pairs, replace(metric, score=dying), rows=16, out=tmp_path, progress=False)
    assert list((tmp_path / "parts").glob("0*.parquet")), "some batches are on disk"
    again = patch(m.model, pairs, metric, rows=16, out=tmp_path, progress=False)
    assert again.frame.drop("value", "recovered").equals(whole.frame.drop("value", "recovered"))
    assert again.frame["value"].to_list() == near(whole.frame["value"].to_list(), m.model(m.clean))
    with torch.no_grad():
        m.model.embed.weight[3] *= 1.01
    with pytest.raises(RunError, match=r"expected settings\.model\.weights"):
        patch(m.model, pairs, metric, rows=16, out=tmp_path, progress=False)


def test_a_sweep_continued_with_its_layers_in_another_order_has_every_cell_once(
    planted: Mechanism, tmp_path: Path
) -> None:
    m = planted
    pairs, metric = Pairs(m.clean, m.corrupt), logit_difference(m.correct, m.wrong)
    calls: list[int] = []

    def dying(logits: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return metric.score(logits)

    with pytest.raises(KeyboardInterrupt):
        patch(m.model, pairs, replace(metric, score=dying), layers=[1, 2], rows=16, out=tmp_path / "s", progress=False)
    again = patch(m.model, pairs, metric, layers=[2, 1], rows=16, out=tmp_path / "s", progress=False)
    assert again.frame.equals(patch(m.model, pairs, metric, layers=[2, 1], rows=16, progress=False).frame)
    assert again.frame["layer"].is_sorted()


PAIRS = Pairs(torch.arange(300, 306)[None], torch.arange(400, 406)[None])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: Pairs(torch.zeros(1, 3).long(), torch.zeros(1, 4).long()),
            "expected clean and corrupt tokens of one",
        ),
        (
            lambda m: patch(m, PAIRS, logit_difference(1, 2), "resid"),
            "components: expected some of resid_pre.*got resid",
        ),
        (lambda m: patch(m, PAIRS, logit_difference(1, 2), layers=[6]), "layers: expected 0 to 5, got 6"),
        (
            lambda m: patch(m, PAIRS, logit_difference(1, 2), direction="up"),
            "direction: expected one of denoise, noise",
        ),
        (
            lambda m: patch(m, PAIRS, logit_difference(1, 1)),
            "expected clean and corrupt to differ, got equal values for 0",
        ),
        (lambda m: patch(m, PAIRS, lambda x: x.mean(-1)), r"metric: expected one number per row \[1\]"),
        (
            lambda m: Pairs(PAIRS.clean, PAIRS.corrupt, positions={"s": [1, 2]}),
            "position 's': expected one for each of 1",
        ),
        (
            lambda m: Pairs(PAIRS.clean, PAIRS.corrupt, positions={"s": [6]}).columns(),
            "expected places inside the prompts",
        ),
        (
            lambda m: patch(m, PAIRS, logit_difference(1, 2), together={"both": [0, 1]}),
            "together: expected a new label for some of the pairs' named positions, got 'both' for 0, 1",
        ),
        (
            lambda m: patch(m, replace(PAIRS, positions={"s": [1]}), logit_difference(1, 2), together={"t": ["u"]}),
            "got 't' for 'u'. Name positions .* there are 's'",
        ),
        (
            lambda m: patch(m, PAIRS, logit_difference(1, 2), all_positions=True, together={"t": ["u"]}),
            "all_positions: expected .* no sets",
        ),
        (lambda m: PAIRS.only("subject"), "pos: expected one of 0, 1, 2, 3, 4, 5, got 'subject'"),
    ],
)
def test_what_cannot_be_patched_is_named(nano: Llama, make: Callable[[Llama], object], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        make(nano)
