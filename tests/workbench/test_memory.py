"""Memory by calculation, and a long run that stays within it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import run_python

from workbench.cli import main
from workbench.errors import ConfigError, ShapeError
from workbench.family import FAMILY
from workbench.memory import config_of, predict, record_bytes
from workbench.models import Llama, Qwen3Moe
from workbench.models.room import GIB

KIB = 1024


@pytest.mark.parametrize(
    ("name", "weights", "cache_per_position"),
    [
        ("llm-jp-4-8b-base", 17_180_393_472, 128 * KIB),
        ("llm-jp-4-33b-thinking", 66_439_096_320, 256 * KIB),
        ("llm-jp-4-32b-a3b-thinking", 64_278_057_984, 64 * KIB),
    ],
)
def test_the_real_models_at_their_whole_context(name: str, weights: int, cache_per_position: int) -> None:
    cfg = FAMILY[name].config
    needed = predict(cfg, 65_536)
    assert abs(needed.weights - weights) < 20_000
    assert needed.cache == 65_536 * cache_per_position
    assert needed.resident == needed.weights + needed.cache + needed.work
    assert needed.records == 0


def test_records_of_the_real_mixture() -> None:
    cfg = FAMILY["llm-jp-4-32b-a3b-thinking"].config
    resid = 32 * 2560 * 2
    assert record_bytes(cfg, ["resid_post"], torch.bfloat16) == resid
    assert record_bytes(cfg, ["router_logits"], torch.bfloat16) == 32 * 128 * 4, "router tensors are float32"
    assert record_bytes(cfg, ["routing"], torch.bfloat16) == 32 * (8 * 6 + 16)
    on_disk = predict(cfg, 65_536, record=["resid_post"])
    in_memory = predict(cfg, 65_536, record=["resid_post"], records_on_disk=False)
    assert on_disk.records == in_memory.records == 65_536 * resid
    assert in_memory.resident == on_disk.resident + on_disk.records


def test_what_is_predicted_is_what_is_kept(moe: Qwen3Moe, tokens: torch.Tensor) -> None:
    names = ["routing", "resid_post", "router_logits", "attn.hook_z", "mlp.hook_expert_out"]
    out = moe.generate(tokens, max_new_tokens=5, stop_ids=(), record=names)
    kept = [*out.record.activations.values(), *out.record.routing.values()]
    needed = predict(moe.cfg, 12, dtype=torch.float32, batch=2, record=names)
    assert sum(tensor.nbytes for tensor in kept) == needed.records
    cache = moe.new_cache(2, 12)
    assert sum(tensor.nbytes for tensor in (*cache.keys, *cache.values)) == needed.cache
    assert sum(parameter.nbytes for parameter in moe.parameters()) == needed.weights


def test_what_cannot_fit_is_refused_with_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["memory", "llm-jp-4-32b-a3b-thinking", "--context", "65536", "--record", "resid_post"]
    assert main([*command, "--available", "80"]) == 0
    shown = capsys.readouterr().out
    assert "weights" in shown
    assert "59.864 GiB" in shown
    assert "4.000 GiB" in shown
    assert "10.000 GiB" in shown
    assert main([*command, "--available", "24"]) == 2
    refused = capsys.readouterr().err
    assert "expected at least" in refused
    assert "weights 59.864 GiB, cache 4.000 GiB" in refused
    assert "got 24.000 GiB" in refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has CUDA")
def test_a_device_that_is_not_there_is_named_before_anything_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cuda", "foo"):
        assert main(["memory", "nano-moe-thinking", "--context", "100", "--device", device]) == 2
        said = capsys.readouterr()
        assert "device: expected one this machine has" in said.err
        assert not said.out


def generate_with(free: int, model: Llama, monkeypatch: pytest.MonkeyPatch, **options: object) -> list[str]:
    """Names of hook points that ran before `generate` ended, with so many bytes free."""
    monkeypatch.setattr("workbench.models.room.available_memory", lambda device="cpu": free)
    seen: list[str] = []
    with model.hooks([("hook_embed", lambda x, hook: seen.append(hook.name))]):
        try:
            model.generate(torch.tensor([[5, 6, 7, 8]]), stop_ids=(), **options)
        except ConfigError as error:
            seen.append(str(error))
    return seen


def test_a_generation_that_cannot_fit_does_not_begin(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    per_position = 2 * llama.cfg.n_layers * llama.cfg.n_kv_heads * llama.cfg.d_head * 4
    work = predict(llama.cfg, 4, dtype=torch.float32).work  # with the mask that an unpadded prompt in one pass lacks
    enough = work + 40 * per_position
    assert generate_with(enough, llama, monkeypatch, max_new_tokens=36, cache="static")[-1] == "hook_embed"
    (refused,) = generate_with(work + 19 * per_position - 1, llama, monkeypatch, max_new_tokens=36, cache="static")
    assert "memory for generate: expected at least 0.000 GiB (cache 0.000 GiB, work 0.000 GiB), got" in refused
    # a cache that grows may never come to its end
    assert "hook_embed" in generate_with(work + 19 * per_position - 1, llama, monkeypatch, max_new_tokens=36)


def test_records_count_where_they_lie_in_memory(llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = predict(llama.cfg, 4, dtype=torch.float32)
    points = {"record": ["resid_post", "resid_mid", "resid_pre", "attn_out", "mlp_out", "normalized", "hook_z"]}
    records = 4 * record_bytes(llama.cfg, points["record"], torch.float32)
    free = needed.cache + needed.work + records  # a pass holds what it shows until it is written
    assert records > needed.work, "the mask that this prompt lacks would hide them"
    (refused,) = generate_with(free, llama, monkeypatch, max_new_tokens=2, **points)
    assert ", records 0.000 GiB)" in refused
    assert "hook_embed" in generate_with(free, llama, monkeypatch, max_new_tokens=2, record_to=tmp_path, **points)


def test_eager_attention_holds_its_scores(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, scores = torch.full((1, 48), 5), 3 * llama.cfg.n_heads * 48 * 48 * 4
    free = predict(llama.cfg, 48, dtype=torch.float32).resident - predict(llama.cfg, 48, dtype=torch.float32).weights
    monkeypatch.setattr("workbench.models.room.available_memory", lambda device="cpu": free)
    assert scores > 48 * 48 * 8, "the mask that this prompt lacks would hide them"
    llama.generate(prompt, max_new_tokens=1)
    looking = llama.hooks([("blocks.0.attn.hook_pattern", lambda x, hook: None)])
    with looking, pytest.raises(ConfigError, match="memory for generate"):
        llama.generate(prompt, max_new_tokens=1)


def test_requests_without_sense_are_named(llama: Llama) -> None:
    with pytest.raises(ShapeError, match="context: expected at most 64 positions, got 65"):
        predict(llama.cfg, 65)
    with pytest.raises(ShapeError, match="batch: expected at least 1"):
        predict(llama.cfg, 10, batch=0)
    with pytest.raises(ConfigError, match="memory: expected at least"):
        predict(llama.cfg, 10).check(1)
    assert config_of("llm-jp/llm-jp-4-8b-base") == FAMILY["llm-jp-4-8b-base"].config


LONG = """
import json, resource, sys, torch
from dataclasses import replace
from workbench.memory import config_of, predict
from workbench.models import build_model, init_weights
torch.set_num_threads(1)
n, folder = int(sys.argv[1]), sys.argv[2]
cfg = config_of("nano-moe-base")
cfg = replace(cfg, n_ctx=n, n_layers=2, sparse_layers=(True, True), n_heads=2, n_kv_heads=1)
model = init_weights(build_model(cfg), 0, std=0.2)
tokens = torch.randint(14, cfg.d_vocab, (1, n - 8), generator=torch.Generator().manual_seed(0))
record = ["routing", "resid_post"]
model.generate(tokens[:, :64], max_new_tokens=2, stop_ids=(), record=record)  # libraries are loaded by now
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
out = model.generate(tokens, max_new_tokens=8, stop_ids=(), record=record, record_to=folder, prefill_chunk=256,
                     cache="static")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
needed = predict(cfg, n, dtype=torch.float32, chunk=256, record=record)
alone = model.run_with_cache(tokens[:, :300], names_filter="blocks.1.hook_resid_post")[1]
diff = (out.record.activations["blocks.1.hook_resid_post"][:, :300] - alone["blocks.1.hook_resid_post"]).abs().max()
print(json.dumps({"grown": peak - before, "needed": needed.resident - needed.weights, "records": needed.records,
                  "shape": list(out.record.activations["blocks.1.hook_resid_post"].shape), "diff": float(diff),
                  "pos": out.routing().select("pos").max().item()}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("n", [65_536])
def test_a_long_run_stays_within_what_was_predicted(tmp_path: Path, n: int) -> None:
    done = run_python(LONG, str(n), str(tmp_path / "record"))
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["shape"] == [1, n, 128]
    assert seen["pos"] == n - 1
    assert seen["diff"] < 1e-3
    written = sum(file.stat().st_size for file in (tmp_path / "record").glob("*.bin"))
    assert written == seen["records"]
    slack = 64 * KIB * KIB  # the allocator's
    assert seen["grown"] < seen["needed"] + slack


def test_the_long_configuration_is_the_bundled_one_with_a_longer_context() -> None:
    cfg = config_of("nano-moe-base")
    assert replace(cfg, n_ctx=65_536).n_params == cfg.n_params
    assert predict(replace(cfg, n_ctx=65_536), 65_536, dtype=torch.float32).cache < GIB
