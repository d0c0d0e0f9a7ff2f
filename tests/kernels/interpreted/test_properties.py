"""What must hold beyond the numbers: determinism, confinement of NaN, ties, extremes of load, buffers nobody wrote."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from moe_problems import BLOCKS, check, problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from workbench_kernels import Intervene, Need, fused_moe
from workbench_kernels.interpreter import poison_buffers, shuffle_programs
from workbench_kernels.moe import stages
from workbench_kernels.moe.blocks import SAFE
from workbench_kernels.moe.plan import NEEDS, PATHS, ROUTED

BF16 = torch.bfloat16
TWO = ("decode", "skinny")  # tile is skinny with the operands of its products exchanged


def run(p: object, path: str, **options: object) -> tuple[Tensor, object]:
    return fused_moe(*p.args, impl="triton", path=path, _blocks=BLOCKS, **options)


@pytest.mark.parametrize("path", TWO)
def test_the_order_of_programs_changes_no_bit(path: str) -> None:
    p = problem(4, 70, 36, 8, 2, BF16)
    blocks = BLOCKS | {"router": BLOCKS["router"] | {"tokens": 2}}
    y, routing = fused_moe(*p.args, impl="triton", path=path, need=NEEDS, _blocks=blocks)
    for seed in range(2):
        with shuffle_programs(seed):
            again, other = fused_moe(*p.args, impl="triton", path=path, need=NEEDS, _blocks=blocks)
        assert torch.equal(again, y)
        for name in ("expert_ids", "routing_weights", "router_logits", "expert_load", *NEEDS):
            assert torch.equal(getattr(other, name), getattr(routing, name)), name


@triton.jit
def add_in_any_order(x, out, B: tl.constexpr):
    tl.atomic_add(out, tl.sum(tl.load(x + tl.program_id(0) * B + tl.arange(0, B)), 0))


def test_shuffling_finds_a_sum_that_depends_on_order() -> None:
    """The control for the test above: float atomics give other bits in another order."""
    x, sums = torch.randn(1024, generator=torch.Generator().manual_seed(0)), set()
    for seed in range(6):
        out = torch.zeros(1)
        with shuffle_programs(seed):
            add_in_any_order[(64,)](x, out, B=16)
        sums.add(out.item())
    assert len(sums) > 1


@pytest.mark.parametrize("path", TWO)
@pytest.mark.parametrize("restricted", [False, True])
def test_no_buffer_is_read_before_it_is_written(path: str, restricted: bool) -> None:
    p = problem(6, 40, 20, 60, 2, BF16)
    need = Need(NEEDS, experts=[0, 1, 2, 3], tokens=[1, 2, 4]) if restricted else Need(NEEDS)
    y, routing = check(p, path, need)
    with poison_buffers():
        again, other = check(p, path, need)
    assert torch.equal(again, y)
    for name in ("expert_ids", "routing_weights", "expert_load", *NEEDS):
        assert torch.equal(getattr(other, name), getattr(routing, name)), name


def test_poison_is_seen_by_who_reads_it() -> None:
    with poison_buffers():
        assert torch.empty(3).isnan().all()
        assert (torch.empty(2, dtype=torch.int32) < -1_000_000).all()


@pytest.mark.parametrize("path", PATHS)
def test_a_bad_row_stays_its_own(path: str) -> None:
    p = problem(6, 37, 19, 8, 2, BF16)
    clean, _ = run(p, path)
    for token, value in ((1, torch.nan), (3, torch.inf), (4, -torch.inf)):
        p.x[token, 5] = value
    y, routing = run(p, path, need=ROUTED)
    others = torch.tensor([True, False, True, False, False, True])
    assert torch.equal(y[others], clean[others])
    assert not y[~others].isfinite().any()
    assert ((routing.expert_ids >= 0) & (routing.expert_ids < 8)).all()
    assert (routing.expert_ids[:, 0] != routing.expert_ids[:, 1]).all()
    for name in ROUTED:
        assert getattr(routing, name)[others].isfinite().all()


@pytest.mark.parametrize("path", TWO)
def test_ties_go_to_the_lowest_ids(path: str) -> None:
    p = problem(4, 24, 12, 8, 3)
    p.router[:] = p.router[0]
    _, routing = run(p, path, need=("margin",))
    assert (routing.expert_ids == torch.arange(3)).all()
    assert (routing.margin == 0).all()
    assert torch.allclose(routing.routing_weights, torch.full((4, 3), 1 / 3))


@pytest.mark.parametrize("path", TWO)
def test_one_expert_may_take_everything_and_others_nothing(path: str) -> None:
    p = problem(17, 24, 12, 6, 1)
    _, routing = check(p, path, ROUTED, Intervene(forced_ids=torch.full((17, 1), 5)))
    assert routing.expert_load.tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("path", TWO)
def test_strided_input(path: str) -> None:
    p = problem(4, 24, 12, 6, 2)
    y, _ = run(p, path)
    wide = torch.full((4, 30), torch.nan)
    wide[:, 3:27] = p.x
    for x in (wide[:, 3:27], p.x.T.contiguous().T):
        assert not x.is_contiguous()
        assert torch.equal(fused_moe(x, *p.args[1:], impl="triton", path=path, _blocks=BLOCKS)[0], y)


@pytest.mark.parametrize("path", TWO)
def test_no_tokens(path: str) -> None:
    p = problem(0, 24, 12, 6, 2, BF16)
    y, routing = check(p, path, NEEDS)
    assert y.shape == (0, 24)
    assert routing.expert_pre.shape == (0, 2, 12)
    assert routing.expert_load.tolist() == [0.0] * 6


@pytest.mark.parametrize("path", PATHS)
def test_a_token_alone_gets_the_bits_that_it_gets_in_company(path: str) -> None:
    """With a pinned path the clean and the patched run may have other batch sizes."""
    p = problem(7, 70, 36, 8, 2, BF16)
    y, _ = fused_moe(*p.args, impl="triton", path=path, _blocks=BLOCKS)
    for token in (0, 4):
        alone, _ = fused_moe(p.x[token : token + 1], *p.args[1:], impl="triton", path=path, _blocks=BLOCKS)
        assert torch.equal(alone[0], y[token])


def test_the_swapped_product_gives_the_same_bits() -> None:
    p = problem(7, 70, 36, 8, 2, BF16)
    assert torch.equal(run(p, "skinny")[0], run(p, "tile")[0])


@pytest.mark.parametrize("path", TWO)
def test_taps_that_look_change_no_bit_and_edits_stay_in_their_slot(path: str) -> None:
    p = problem(5, 24, 12, 6, 2, BF16)
    clean, routing = run(p, path, need=ROUTED)
    names = ("router_logits", "router_probs", "expert_ids", "routing_weights", *ROUTED)
    seen: dict[str, Tensor] = {}
    taps = {name: (lambda rows, name=name: seen.setdefault(name, rows)) for name in names}
    assert torch.equal(tapped(p, path, taps), clean)
    assert set(seen) == set(names)
    for name in ROUTED:
        assert torch.equal(seen[name], getattr(routing, name)), name

        def silence(rows: Tensor) -> Tensor:
            rows[3, 1] = 0  # in place
            return rows

        changed = (tapped(p, path, {name: silence}) != clean).any(-1).tolist()
        assert changed == [False, False, False, True, False], name


@pytest.mark.parametrize("path", [pytest.param("decode", marks=pytest.mark.slow), "tile"])
def test_taps_at_the_router_act_as_the_interventions_do(path: str) -> None:
    p = problem(5, 24, 12, 6, 2)
    bias = torch.linspace(-2, 2, 6)
    ids = torch.tensor([5, 1]).expand(5, 2)
    weights = torch.full((5, 2), 0.25)
    for name, edit, change in (
        ("router_logits", lambda z: z + bias, Intervene(router_bias=bias)),
        ("router_probs", lambda q: (q.log() + bias).softmax(-1), Intervene(router_bias=bias)),
        ("expert_ids", lambda i: ids, Intervene(forced_ids=ids)),
        ("routing_weights", lambda w: weights, Intervene(forced_weights=weights)),
    ):
        expected, _ = run(p, path, intervene=change)
        assert torch.allclose(tapped(p, path, {name: edit}), expected, atol=1e-5), name


def tapped(p: object, path: str, taps: dict[str, object]) -> Tensor:
    from workbench_kernels.moe.api import plan_layer

    layer = plan_layer(*p.args, True, Need(), Intervene(), path, "trained", BLOCKS)
    routed, tiles = stages.order(layer, stages.route(layer, taps))
    return stages.experts(layer, routed, tiles, taps)[0]


class Launches(TorchDispatchMode):
    """Everything that would be launched on a device: kernels of ours, and operations of torch that touch values."""

    FREE = ("empty", "empty_strided", "view", "detach", "alias", "_to_copy", "unsqueeze", "expand", "slice")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.inside = False

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        name = func.overloadpacket.__name__
        copies = name == "_to_copy" and args[0].dtype != (kwargs or {}).get("dtype", args[0].dtype)
        if not self.inside and (copies or name not in self.FREE):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))

    def kernel(self, call: object, executor: object, *args: object, **kwargs: object) -> None:
        self.seen.append(executor.fn.__name__)
        self.inside = True  # what the interpreter itself does with tensors
        call(executor, *args, **kwargs)
        self.inside = False


@pytest.mark.parametrize("restricted", [False, True])
def test_at_one_token_a_layer_takes_at_most_five_launches(restricted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    call, launches = interpreter.GridExecutor.__call__, Launches()
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *a, **kw: launches.kernel(call, *a, **kw))
    p, some = problem(1, 24, 12, 6, 2, BF16), torch.arange(6) < 3
    need = Need(NEEDS, experts=some, tokens=torch.ones(1, dtype=torch.bool)) if restricted else Need(NEEDS)
    change = Intervene(expert_scale=torch.ones(6), keep_mask=torch.ones(6, dtype=torch.bool))
    # on CPU the values of interventions are checked, which launches nothing on a GPU
    monkeypatch.setattr("workbench_kernels.moe.checks._check_values", lambda *_: None)
    with launches:
        _, routing = fused_moe(*p.args, impl="triton", need=need, intervene=change, _blocks=BLOCKS)
    assert routing.path == "decode"
    assert len(launches.seen) <= 5, launches.seen
    assert "decode_down_kernel" in launches.seen


def test_the_sort_of_many_slots_is_the_stable_one() -> None:
    """Enough slots that a program takes several steps, and a tile map that spans all experts."""
    n, e = 8500, 7
    ids = torch.randint(0, e, (n // 2, 2), generator=torch.Generator().manual_seed(0))
    p = problem(n // 2, 4, 2, e, 2)
    from workbench_kernels.moe.api import plan_layer

    layer = plan_layer(*p.args, True, Need(), Intervene(), "tile", "trained", SAFE["tile"])
    zeros = torch.zeros(n // 2, e)
    routed, tiles = stages.order(layer, stages.Routed(zeros, ids, zeros[:, :2]))
    assert torch.equal(tiles.slots.long(), ids.flatten().sort(stable=True).indices)
    counts = torch.bincount(ids.flatten(), minlength=e)
    assert torch.allclose(routed.load, counts / n)
    real = tiles.expert >= 0
    assert int(real.sum()) == int(((counts + 63) // 64).sum())
    assert not real[int(real.sum()) :].any()
    ends, starts = counts.cumsum(0), counts.cumsum(0) - counts
    for expert, first, end in zip(tiles.expert[real], tiles.first[real], tiles.end[real], strict=True):
        assert end == ends[expert]
        assert starts[expert] <= first < end
        assert (first - starts[expert]) % 64 == 0
