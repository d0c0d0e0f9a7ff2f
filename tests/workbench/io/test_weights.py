"""load_model and save_model: what is read, what is written, which tensors are refused."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import assert_same_weights, edit_json, edit_tensors, run_python
from tests.parity_configs import CASES, ParityCase, hf_model, random_tokens, write_checkpoint
from tests.tokenizer_files import small_spec
from workbench.config import Qwen3MoeConfig, RopeConfig
from workbench.errors import CheckpointError, ConfigError
from workbench.io import checkpoint
from workbench.io.names import slots
from workbench.io.saving import save_model
from workbench.io.weights import load_model
from workbench.models import Llama, build_model, init_weights

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"


# --- there and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("max_shard_bytes", [20_000, 5_000_000_000])
def test_a_saved_model_loads_back_bit_equal(
    model: Llama, tokens: torch.Tensor, tmp_path: Path, layout: str, max_shard_bytes: int
) -> None:
    path = save_model(model, tmp_path / "out", layout=layout, max_shard_bytes=max_shard_bytes)
    loaded = load_model(path)
    assert loaded.cfg == model.cfg
    assert loaded.source == str(path)
    assert not loaded.training
    assert_same_weights(model, loaded)
    assert torch.equal(loaded(tokens), model(tokens))
    assert (len(list(path.glob("*.safetensors"))) > 1) == (max_shard_bytes == 20_000)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[9]], ids=lambda case: case.name)
def test_transformers_loads_what_we_save(case: ParityCase, tmp_path: Path, layout: str) -> None:
    transformers = pytest.importorskip("transformers")
    first = hf_model(case)
    ours = load_model(write_checkpoint(first, case, tmp_path / "theirs"))
    path = save_model(ours, tmp_path / "ours", layout=layout, max_shard_bytes=100_000)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(again(random_tokens(case)).logits, first(random_tokens(case)).logits)


def test_tied_embeddings_stay_tied(llama: Llama, tmp_path: Path) -> None:
    tied = init_weights(build_model(replace(llama.cfg, tie_embeddings=True)), seed=0)
    path = save_model(tied, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    loaded = load_model(path)
    assert loaded.unembed.weight is loaded.embed.weight
    assert "unembed.weight" not in dict(loaded.named_parameters())
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_same_weights(tied, load_model(path))
    edit_tensors(path, lambda t: t["lm_head.weight"][3].add_(1))
    with pytest.raises(CheckpointError, match=r"lm_head.weight: differs from model.embed_tokens.weight, which config"):
        load_model(path)


def test_dtype_is_the_stored_one_or_the_asked_one(moe: Llama, one_file: Path, tmp_path: Path) -> None:
    half = save_model(moe.to(torch.bfloat16), tmp_path / "half")
    assert load_model(half).dtype == torch.bfloat16
    assert load_model(half, dtype=torch.float32).dtype == torch.float32
    assert_same_weights(load_model(half, dtype="float32"), moe.to(torch.float32))
    assert_same_weights(load_model(one_file, dtype="bfloat16"), load_model(half))
    with pytest.raises(CheckpointError, match="dtype: expected auto, float64, float32, float16, bfloat16, got 'int8'"):
        load_model(one_file, dtype="int8")


def test_an_unknown_device_is_named(one_file: Path) -> None:
    with pytest.raises(CheckpointError, match="device: expected one this machine has, got 'xyz'"):
        load_model(one_file, device="xyz")


def test_loading_passes_on_how_to_run(one_file: Path) -> None:
    assert load_model(one_file).moe_impl == "sorted"
    assert load_model(one_file, moe_impl="reference").moe_impl == "reference"
    assert load_model(one_file, router_dtype="model").router_dtype == "model"
    with pytest.raises(ConfigError, match="moe_impl"):
        load_model(one_file, moe_impl="fast")
    with pytest.raises(ConfigError, match="router_dtype"):
        load_model(one_file, router_dtype="float16")


def test_rotary_buffers_of_old_checkpoints_are_ignored(moe: Llama, one_file: Path) -> None:
    edit_tensors(one_file, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert_same_weights(moe, load_model(one_file))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.self_attn.rotary_emb.inv_freq",
        "model.layers.00.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "other.rotary_emb.inv_freq",
    ],
)
def test_rotary_buffers_anywhere_else_are_extra(one_file: Path, name: str) -> None:
    edit_tensors(one_file, lambda t: t.update({name: torch.ones(4)}))
    with pytest.raises(CheckpointError, match=f"{name}: not part of this model"):
        load_model(one_file)


def test_pieces_smaller_than_a_tensor_add_up(moe: Llama, one_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 300)
    monkeypatch.setattr(checkpoint, "PIECE_SHARE", 0.0)
    assert_same_weights(moe, load_model(one_file))


# --- accounting ---------------------------------------------------------------------------------------------------


def test_missing_and_extra_tensors_are_named(one_file: Path) -> None:
    edit_tensors(one_file, lambda t: t.update(surplus=t.pop(Q_PROJ)))
    with pytest.raises(CheckpointError, match=f"got 2 problems:(.|\n)*{Q_PROJ}: missing(.|\n)*surplus: not part of"):
        load_model(one_file)


def test_an_untied_model_needs_its_head(one_file: Path) -> None:
    edit_tensors(one_file, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head.weight: missing"):
        load_model(one_file)


def test_a_wrong_shape_is_named(one_file: Path) -> None:
    edit_tensors(one_file, lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()}))
    with pytest.raises(CheckpointError, match=re.escape(f"{EXPERT}: shape [32, 12], not [12, 32]")):
        load_model(one_file)


@pytest.mark.parametrize(("dtype", "shown"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_a_quantised_tensor_is_named(one_file: Path, dtype: torch.dtype, shown: str) -> None:
    edit_tensors(one_file, lambda t: t.update({Q_PROJ: t[Q_PROJ].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"{Q_PROJ}: dtype {shown}, not one of F64, F32, F16, BF16"):
        load_model(one_file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_tensors_that_are_not_finite_are_all_named(one_file: Path, dtype: torch.dtype, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        tensors[Q_PROJ][1, 2] = value
        tensors[EXPERT][-1, -1] = value

    edit_tensors(one_file, spoil)
    with pytest.raises(CheckpointError, match="got 2 problems") as caught:
        load_model(one_file)
    assert f"{Q_PROJ}: holds NaN or infinity" in str(caught.value)
    assert f"{EXPERT}: holds NaN or infinity" in str(caught.value)


def test_values_that_overflow_the_asked_dtype_are_named(one_file: Path) -> None:
    edit_tensors(one_file, lambda t: t[Q_PROJ].fill_(1e6))
    assert load_model(one_file, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ}: holds NaN or infinity as torch.float16"):
        load_model(one_file, dtype="float16")


def test_long_lists_of_problems_are_capped_with_a_count(one_file: Path) -> None:
    edit_tensors(one_file, lambda t: [t.pop(name) for name in list(t) if ".experts." in name])
    with pytest.raises(CheckpointError, match="got 48 problems") as caught:
        load_model(one_file)
    assert str(caught.value).count(": missing") == checkpoint.MAX_LISTED
    assert "and 36 more" in str(caught.value)


def test_a_config_of_another_model_does_not_load(one_file: Path) -> None:
    edit_json(one_file / "config.json", lambda c: c.update(num_experts=9))
    with pytest.raises(CheckpointError, match=r"model.layers.0.mlp.experts.8.down_proj.weight: missing"):
        load_model(one_file)


def test_quantised_checkpoints_are_refused_by_name(one_file: Path) -> None:
    edit_json(one_file / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    with pytest.raises(CheckpointError, match=r"expected plain weights, got quantization_config \(gptq\)"):
        load_model(one_file)


# --- what lies beside the weights ---------------------------------------------------------------------------------


@pytest.fixture
def tokenizer_json() -> str:
    return json.dumps(small_spec())


@pytest.fixture
def with_vocabulary(llama: Llama, tmp_path: Path) -> Path:
    """A checkpoint of a model large enough for the small tokenizer, without tokenizer files."""
    return save_model(init_weights(build_model(replace(llama.cfg, d_vocab=512)), seed=0), tmp_path / "one")


def test_tokenizer_and_template_come_along(with_vocabulary: Path, tokenizer_json: str, tmp_path: Path) -> None:
    path = with_vocabulary
    assert load_model(path).tokenizer is None
    assert load_model(path).chat_template is None
    (path / "tokenizer.json").write_text(tokenizer_json)
    (path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    loaded = load_model(path)
    again = load_model(save_model(loaded, tmp_path / "two"))
    assert again.tokenizer.hash == loaded.tokenizer.hash
    assert again.chat_template == "{{ messages }}"
    assert (tmp_path / "two" / "tokenizer.json").read_text() == tokenizer_json
    assert (tmp_path / "two" / "tokenizer_config.json").read_text() == '{"add_bos_token": true}'


@pytest.mark.parametrize(
    ("generation", "tokenizer", "stop_ids"),
    [
        (None, False, (2,)),
        ({"eos_token_id": [7, 13]}, False, (7, 13)),
        ({"eos_token_id": 7}, False, (7,)),
        ({"eos_token_id": 2}, True, (2, 13)),
        ({"temperature": 0.7}, True, (2, 13)),
    ],
)
def test_stop_ids_come_from_the_generation_config(
    with_vocabulary: Path, tokenizer_json: str, generation: dict | None, tokenizer: bool, stop_ids: tuple[int, ...]
) -> None:
    path = with_vocabulary
    (path / "generation_config.json").unlink()
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer:
        (path / "tokenizer.json").write_text(tokenizer_json)
    assert load_model(path).stop_ids == stop_ids


@pytest.mark.parametrize("ends", ["</s>", True, 1.5, -1, 512, {"id": 2}, ["2"], [2, None], [[2]]])
def test_stop_ids_that_are_none_are_refused(with_vocabulary: Path, ends: object) -> None:
    (with_vocabulary / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    expected = f"generation_config.json: expected eos_token_id to be null, an id below 512 or a list.*got {ends!r}"
    with pytest.raises(CheckpointError, match=expected.replace("[", r"\[")):
        load_model(with_vocabulary)


def test_null_as_stop_id_leaves_those_of_the_config(with_vocabulary: Path) -> None:
    (with_vocabulary / "generation_config.json").write_text('{"eos_token_id": null}')
    assert load_model(with_vocabulary).stop_ids == (2,)


def test_a_template_that_is_no_utf8_is_refused(one_file: Path) -> None:
    (one_file / "chat_template.jinja").write_bytes("日本".encode("shift_jis"))
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: expected UTF-8 text"):
        load_model(one_file)


def test_a_template_of_transformers_4_is_read_where_it_stands(one_file: Path, tmp_path: Path) -> None:
    config = one_file / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "{{ old }}"}))
    loaded = load_model(one_file)
    assert loaded.chat_template == "{{ old }}"
    assert load_model(save_model(loaded, tmp_path / "again")).chat_template == "{{ old }}"
    (one_file / "chat_template.jinja").write_text("{{ own }}")
    assert load_model(one_file).chat_template == "{{ own }}"


@pytest.mark.parametrize("template", [[{"name": "default", "template": "{{ a }}"}], {"a": 1}, 3])
def test_a_template_that_is_no_text_is_refused(one_file: Path, template: object) -> None:
    (one_file / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: expected chat_template to be one text"):
        load_model(one_file)


def test_a_tokenizer_larger_than_the_model_is_refused(one_file: Path, tokenizer_json: str) -> None:
    (one_file / "tokenizer.json").write_text(tokenizer_json)
    with pytest.raises(CheckpointError, match="expected a tokenizer of at most 60 tokens, got"):
        load_model(one_file)


def test_a_tokenizer_is_saved_even_when_its_file_is_gone(
    with_vocabulary: Path, tokenizer_json: str, tmp_path: Path
) -> None:
    (with_vocabulary / "tokenizer.json").write_text(tokenizer_json)
    loaded = load_model(with_vocabulary)
    shutil.rmtree(with_vocabulary)
    assert load_model(save_model(loaded, tmp_path / "two")).tokenizer.hash == loaded.tokenizer.hash


# --- writing ------------------------------------------------------------------------------------------------------


def test_saving_replaces_a_checkpoint_whole(moe: Llama, sharded: Path) -> None:
    save_model(moe, sharded)
    assert sorted(file.name for file in sharded.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert [entry.name for entry in sharded.parent.iterdir()] == ["sharded"]


def test_saving_replaces_nothing_else(moe: Llama, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(CheckpointError, match="expected a new directory or an earlier checkpoint"):
            save_model(moe, path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_checkpoint_with_something_else_beside_it_is_not_replaced(moe: Llama, one_file: Path) -> None:
    (one_file / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="expected a new directory or an earlier checkpoint"):
        save_model(moe, one_file)
    (one_file / "thesis.txt").unlink()
    (one_file / "notes").mkdir()
    with pytest.raises(CheckpointError, match="expected a new directory or an earlier checkpoint"):
        save_model(moe, one_file)
    assert_same_weights(moe, load_model(one_file))


def test_a_save_that_fails_between_its_two_renames_puts_the_earlier_checkpoint_back(
    moe: Llama, one_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def second_fails(source: Path, target: Path) -> Path:
        if source.suffix == ".new":
            raise OSError("on purpose")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OSError, match="on purpose"):
        save_model(moe, one_file)
    assert_same_weights(moe, load_model(one_file))
    assert [entry.name for entry in one_file.parent.iterdir()] == [one_file.name]


def test_a_place_that_cannot_be_written_is_named(moe: Llama, one_file: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a place to write"):
        save_model(moe, one_file / "config.json" / "child")


def test_a_skeleton_is_not_a_loaded_model(one_file: Path) -> None:
    with pytest.raises(CheckpointError, match="device: expected one that holds weights, got 'meta'"):
        load_model(one_file, device="meta")


def test_a_failed_save_leaves_the_earlier_checkpoint(
    moe: Llama, one_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("workbench.io.saving.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(moe, one_file)
    assert_same_weights(moe, load_model(one_file))
    assert [entry.name for entry in one_file.parent.iterdir()] == [one_file.name]


def test_a_checkpoint_may_be_read_by_whom_the_umask_lets(moe: Llama, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_model(moe, tmp_path / "out")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o640}


def test_a_shard_that_may_not_be_read_is_not_called_corrupt(one_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a readable file, got Permission denied"):
        checkpoint.read_headers(one_file)


def test_save_checks_its_arguments(moe: Llama, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="layout: expected one of per_expert, fused, got 'other'"):
        save_model(moe, tmp_path / "out", layout="other")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="max_shard_bytes: expected a positive size, got 0"):
        save_model(moe, tmp_path / "out", max_shard_bytes=0)


def test_the_index_of_a_sharded_checkpoint_adds_up(moe: Llama, sharded: Path) -> None:
    index = json.loads((sharded / checkpoint.INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(param.nbytes for param in moe.parameters())
    assert index["weight_map"].keys() == slots(moe.cfg, "per_expert").keys()
    assert all((sharded / file).stat().st_size <= 24_000 for file in index["weight_map"].values())


# --- memory -------------------------------------------------------------------------------------------------------

MEASURE = """
import re, sys
from pathlib import Path
from workbench.io.weights import load_model

def memory(field):  # not getrusage: its peak includes the parent's memory before exec
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

load_model(sys.argv[1])  # what torch and we import on first use is not the model's
before = memory("VmRSS")
model = load_model(sys.argv[2], dtype=sys.argv[3])
print((memory("VmHWM") - before) / sum(param.nbytes for param in model.parameters()))
"""


def test_what_the_dtype_of_the_embedding_rounds_is_named(moe: Llama, tmp_path: Path) -> None:
    path = save_model(moe.bfloat16(), tmp_path / "mixed")
    router = "model.layers.0.mlp.gate.weight"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(path)
    edit_tensors(path, lambda tensors: tensors.update({router: tensors[router].float() + 1e-4}))
    with pytest.warns(UserWarning, match=rf"dtype auto: .*torch.bfloat16, got 1 .*: {router}\. Pass dtype='float32'"):
        load_model(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = load_model(path, dtype="float32")
        asked = load_model(path, dtype="bfloat16")
    kept, rounded = (dict(model.named_parameters())["blocks.0.mlp.router.weight"] for model in (exact, asked))
    assert not torch.equal(kept, kept.bfloat16().float())
    assert torch.equal(kept.bfloat16(), rounded)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_peak_memory_stays_within_a_tenth_of_the_model(one_file: Path, tmp_path: Path, layout: str, dtype: str) -> None:
    cfg = Qwen3MoeConfig(
        d_model=512, n_layers=8, n_heads=8, n_kv_heads=2, d_head=64, d_mlp=1024, d_vocab=20_000, n_ctx=512,
        norm_eps=1e-6, rope=RopeConfig(1e4), n_experts=32, k=4, d_expert=384, sparse_layers=(True,) * 8,
    )  # fmt: skip
    model = build_model(cfg, torch.bfloat16)
    for param in model.parameters():
        param.data.fill_(0.01)
    path = save_model(model, tmp_path / "big", layout=layout, max_shard_bytes=100_000_000)
    result = run_python(MEASURE, str(one_file), str(path), dtype)
    shutil.rmtree(path)  # pytest would keep it
    assert float(result.stdout) <= 1.1, result.stderr


def test_the_progress_bar_is_for_terminals_only(one_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(one_file)
    load_model(one_file, progress=False)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""


def test_the_progress_bar_counts_all_bytes(moe: Llama, one_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    load_model(one_file, progress=False)
    assert sys.stderr.getvalue() == ""
    load_model(one_file)
    assert "100%|" in sys.stderr.getvalue()
