"""Tables of block sizes and the tuner: what is found, what is said, what is refused; no GPU needed."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench_kernels import tables, tune
from workbench_kernels.moe.blocks import SAFE, arithmetic
from workbench_kernels.moe.plan import PATHS

SHAPE = {"d_model": 2560, "d_expert": 960, "n_experts": 128, "k": 8}
SHIPPED = sorted(path.stem for path in tables.PACKAGED.glob("*.json"))


def entry(**changes: Any) -> dict[str, Any]:
    plain = {"device": "*", "triton": "*", "shape": "*", "dtype": "bfloat16", "bits": 16, "tuned": False}
    return plain | {"decode": {"1": {"name": "one"}, "4": {"name": "four"}}} | changes


@pytest.mark.parametrize("arch", ["gfx942", "sm_100", "sm_80", "sm_90"])
def test_shipped_tables_hold_every_format_and_path_and_admit_what_was_not_tuned(arch: str) -> None:
    assert arch in SHIPPED
    table = tables.entries(arch)
    found = {(one["dtype"], one["bits"]) for one in table}
    assert found >= {(dtype, bits) for dtype in ("bfloat16", "float16") for bits in (16, 8, 4)} | {("float32", 16)}
    for one in table:
        assert one["tuned"] is False  # no GPU measured these; the tuner writes entries that say otherwise
        for path in PATHS:
            for bucket, blocks in one[path].items():
                assert int(bucket) >= 1
                assert blocks.keys() == SAFE[path].keys()
                for part in ("gate_up", "down"):
                    assert blocks[part].keys() - {"wgmma"} == SAFE[path][part].keys()
    assert tables.dump(table) == (tables.PACKAGED / f"{arch}.json").read_text()


@pytest.mark.parametrize("arch", SHIPPED)
def test_the_sizes_that_decide_the_bits_do_not_vary_with_the_number_of_tokens(arch: str) -> None:
    for one in tables.entries(arch):
        for path in PATHS:
            orders = [arithmetic(path, blocks) for blocks in one[path].values()]
            assert all(order == orders[0] for order in orders), (one["dtype"], one["bits"], path)


@pytest.mark.parametrize("path", PATHS)
def test_the_tuner_keeps_the_bits_of_a_paths_first_bucket(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever sizes win: here the last in the list."""
    tuner = tune.Tuner({"d_model": 16, "d_expert": 8, "n_experts": 4, "k": 2}, torch.float32, 16, torch.device("cpu"))
    seconds = iter(range(10_000, 0, -1))
    monkeypatch.setattr(tuner, "right", lambda *arguments: True)
    monkeypatch.setattr(tuner, "_seconds", lambda *arguments: float(next(seconds)))
    deadline = time.monotonic() + 60
    first = tuner.best(path, 8, deadline)
    assert arithmetic(path, first) != arithmetic(path, tuner.best(path, 8, deadline, SAFE[path]))
    other = tuner.best(path, 9, deadline, first)
    assert arithmetic(path, other) == arithmetic(path, first)


def test_the_most_specific_entry_wins() -> None:
    table = [entry(), entry(device="A"), entry(device="A", shape=SHAPE), entry(shape=SHAPE, triton="3.6")]
    wanted = {"device": "A", "triton": "3.6", "shape": SHAPE, "dtype": "bfloat16", "bits": 16}
    assert tables.select(table, wanted, "decode") is table[2]
    assert tables.select(table, wanted | {"device": "B"}, "decode") is table[3]
    assert tables.select(table, wanted | {"device": "B", "triton": "3.9"}, "decode") is table[0]
    assert tables.select(table, wanted | {"bits": 8}, "decode") is None
    assert tables.select(table, wanted, "tile") is None


@pytest.mark.parametrize(("n_tokens", "name"), [(1, "one"), (3, "one"), (4, "four"), (99, "four")])
def test_the_nearest_lower_bucket_counts(n_tokens: int, name: str) -> None:
    assert tables.nearest(entry()["decode"], n_tokens)["name"] == name
    assert tables.nearest({"8": {"name": "eight"}}, 2)["name"] == "eight"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device by name only."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(tables, "architecture", lambda device: "sm_90")
    tables._say.cache_clear()
    return torch.device("cuda", 0)


def test_untuned_sizes_say_so_once(gpu: torch.device) -> None:
    with pytest.warns(UserWarning, match=r"Some GPU \(sm_90\): block sizes were not tuned on this device"):
        blocks = tables.lookup("tile", 3000, SHAPE, torch.bfloat16, 16, gpu)
    assert blocks == tables.entries("sm_90")[0]["tile"]["2048"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tables.lookup("tile", 3000, SHAPE, torch.bfloat16, 16, gpu) == blocks


def test_an_unknown_device_gets_safe_sizes_and_says_so(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "architecture", lambda device: "sm_89")
    with pytest.warns(UserWarning, match=r"Some GPU \(sm_89\): no table of block sizes .* safe ones run"):
        assert tables.lookup("decode", 1, SHAPE, torch.bfloat16, 16, gpu) is None


def test_a_users_tuned_table_comes_first(gpu: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tuned = entry(device="Some GPU", shape=SHAPE, triton=tables.triton_release(), tuned=True)
    tables.write_entry(tmp_path / "sm_90.json", tuned | {"decode": {"1": {"name": "old"}}})
    tables.write_entry(tmp_path / "sm_90.json", tuned)
    assert json.loads((tmp_path / "sm_90.json").read_text()) == [tuned]
    monkeypatch.setenv(tables.VARIABLE, str(tmp_path))
    tables.entries.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tables.lookup("decode", 2, SHAPE, torch.bfloat16, 16, gpu) == {"name": "one"}
    monkeypatch.undo()
    tables.entries.cache_clear()


@pytest.mark.parametrize("text", ["{", "[3]", '[{"device": "*"}]'])
def test_a_broken_table_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "sm_90.json").write_text(text)
    with pytest.raises(ValueError, match=r"sm_90\.json: expected"):
        tables.read_table(tmp_path / "sm_90.json")


def test_tuning_without_a_gpu_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert tune.main([]) == 1
    assert capsys.readouterr().err.startswith("tune: expected a GPU, got none.")


@pytest.mark.parametrize("path", PATHS)
def test_candidates_vary_one_part_and_start_from_what_is_known(path: str) -> None:
    start = SAFE[path]
    for part in ("gate_up", "down"):
        found = list(tune.candidates(path, part, 16, start))
        assert found[0] is start
        assert len(found) > 20
        other = "down" if part == "gate_up" else "gate_up"
        assert all(blocks[other] == start[other] and blocks.keys() == start.keys() for blocks in found)
        if part == "down" and path != "decode":
            assert {blocks["bm"] for blocks in found} == {start["bm"]}


def test_the_tuner_drops_wrong_and_failing_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"d_model": 16, "d_expert": 8, "n_experts": 4, "k": 2}
    tuner = tune.Tuner(shape, torch.float32, 16, torch.device("cpu"))
    x = tuner._inputs(3)
    right = tuner._run(x, tuner.layers[0], impl="sorted")
    answers = {"good": right, "bad": right + 1, "nan": right * torch.nan}

    def run(x: torch.Tensor, layer: Any, *, _blocks: dict[str, str], **options: Any) -> torch.Tensor:
        if _blocks["name"] == "broken":
            raise RuntimeError("out of resources")
        return answers[_blocks["name"]]

    monkeypatch.setattr(tuner, "_run", run)
    verdicts = {name: tuner.right("decode", {"name": name}, x, right) for name in ("good", "bad", "nan", "broken")}
    assert verdicts == {"good": True, "bad": False, "nan": False, "broken": False}
    assert len(tuner.dropped) == 3
