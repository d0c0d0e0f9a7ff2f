"""Random checkpoints that transformers itself writes: the shapes and spellings that parity is tested on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 500_000.0}

_SHARED = {"num_hidden_layers": 4, "vocab_size": 128, "max_position_embeddings": 256, "rope_parameters": PLAIN}
_DENSE = {**_SHARED, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 4}
_MOE = {
    **_DENSE, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 48, "norm_topk_prob": True,
}  # fmt: skip


@dataclass(frozen=True)
class ParityCase:
    """One random checkpoint: `layout` on disk, `spelling` of config.json, `experts` implementation of transformers."""

    name: str
    values: dict[str, Any] = field(hash=False)
    layout: str = "per_expert"
    spelling: str = "transformers 5"
    experts: str = "grouped_mm"

    @property
    def is_moe(self) -> bool:
        return "num_experts" in self.values


CASES = [
    ParityCase("llama_mha", _DENSE),
    ParityCase("llama_gqa_6_2_llama3", {**_DENSE, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2,
                                        "rope_parameters": LLAMA3}),
    ParityCase("llama_mqa_5_1_tied", {**_DENSE, "hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 1,
                                      "tie_word_embeddings": True}),
    ParityCase("llama_wide_head_linear", {**_DENSE, "head_dim": 24, "rope_parameters": LINEAR},
               spelling="transformers 4"),
    ParityCase("llama_plain_spelled_4", {**_DENSE, "num_key_value_heads": 2}, spelling="transformers 4"),
    ParityCase("llama_llama3_spelled_4", {**_DENSE, "rope_parameters": LLAMA3}, spelling="transformers 4"),
    ParityCase("moe", _MOE),
    ParityCase("moe_fused", {**_MOE, "norm_topk_prob": False}, layout="fused"),
    ParityCase("moe_eager", _MOE, experts="eager"),
    ParityCase("moe_sparse_step_2", {**_MOE, "decoder_sparse_step": 2, "num_hidden_layers": 5}, layout="fused"),
    ParityCase("moe_dense_layers_tied", {**_MOE, "mlp_only_layers": [0, 3], "tie_word_embeddings": True}),
    ParityCase("moe_128_experts", {**_MOE, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 16}),
    ParityCase("moe_128_experts_eager", {**_MOE, "num_experts": 128, "num_experts_per_tok": 8,
                                         "moe_intermediate_size": 16}, layout="fused", experts="eager"),
    ParityCase("moe_gqa_6_2_wide_head", {**_MOE, "num_attention_heads": 6, "head_dim": 24, "rope_parameters": LINEAR},
               spelling="transformers 4"),
    ParityCase("moe_mqa_5_1_llama3", {**_MOE, "num_attention_heads": 5, "num_key_value_heads": 1,
                                      "rope_parameters": LLAMA3}, layout="fused"),
    ParityCase("moe_top_1", {**_MOE, "num_experts_per_tok": 1}),
    ParityCase("moe_top_all_unnormalised", {**_MOE, "num_experts_per_tok": 8, "norm_topk_prob": False},
               spelling="transformers 4"),
]  # fmt: skip

# One layer at the width of the real models; the vocabulary is small because it is the same lookup at any size.
REAL_MOE_LAYER = ParityCase("real_32b_a3b_layer", {
    **_SHARED, "num_hidden_layers": 1, "hidden_size": 2560, "intermediate_size": 7680, "num_attention_heads": 40,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 960, "norm_topk_prob": True, "max_position_embeddings": 65_536,
})  # fmt: skip
REAL_DENSE_LAYER = ParityCase("real_8b_layer", {
    **_SHARED, "num_hidden_layers": 1, "hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 65_536,
})  # fmt: skip


def hf_model(case: ParityCase, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random transformers model whose layers all matter and whose routers choose with realistic margins.

    transformers' own initialisation gives near-identity layers and near-uniform routers, on which any router passes.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    config_class, model_class = (
        (Qwen3MoeConfig, Qwen3MoeForCausalLM) if case.is_moe else (LlamaConfig, LlamaForCausalLM)
    )
    config = config_class(**case.values, dtype=dtype, bos_token_id=1, eos_token_id=2)
    with torch.device("meta"):
        model = model_class(config)
    if case.is_moe:
        model.set_experts_implementation(case.experts)
    rotary = type(model.model.rotary_emb)(config)
    model = model.to(dtype).to_empty(device="cpu").eval()
    model.model.rotary_emb = rotary
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            _fill(name, param, generator)
    return model


def _fill(name: str, param: torch.Tensor, generator: torch.Generator) -> None:
    if param.ndim == 1:  # norms
        param.copy_(1 + 0.2 * torch.randn(param.shape, generator=generator))
        return
    scale = 1.0 if "embed_tokens" in name else param.shape[-1] ** -0.5
    if name.endswith("mlp.gate.weight"):
        scale *= 1.5
    rows = param.reshape(-1, param.shape[-1])
    # The largest tensors repeat a block, shifted: distinct rows at a fraction of the price of as many normals.
    block = torch.randn(min(len(rows), 16_384), rows.shape[1], generator=generator) * scale
    for number, part in enumerate(rows.split(len(block))):
        part.copy_(block[: len(part)].roll(7 * number, dims=1))


def write_checkpoint(model: Any, case: ParityCase, directory: Path) -> Path:
    """Let transformers write `model`, in the case's layout, and respell config.json if the case asks for it."""
    model.save_pretrained(directory, save_original_format=case.layout == "per_expert")
    if case.spelling == "transformers 4":
        path = directory / "config.json"
        config = json.loads(path.read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        if "num_local_experts" in config:
            config["num_experts"] = config.pop("num_local_experts")
        config["torch_dtype"] = config.pop("dtype")
        path.write_text(json.dumps(config))
    return directory


def random_tokens(case: ParityCase, batch: int = 2, pos: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, case.values["vocab_size"], (batch, pos), generator=torch.Generator().manual_seed(seed))
