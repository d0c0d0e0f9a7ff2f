"""transformers' model around the weights of ours: nothing is copied, so both fit where one does."""

from __future__ import annotations

from typing import Any

import torch

from workbench.hf_config import config_to_hf
from workbench.io.names import slots
from workbench.models import KVCache
from workbench.models.llama import Llama


def transformers_model(model: Llama, implementation: str = "grouped_mm") -> Any:
    """transformers' Qwen3-MoE with sdpa and its fastest experts. Raises ImportError when transformers is missing."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

    fields = {name: value for name, value in config_to_hf(model.cfg).items() if name != "model_type"}
    config = Qwen3MoeConfig(**fields)
    config._attn_implementation, config._experts_implementation = "sdpa", implementation
    with torch.device("meta"):
        peer = Qwen3MoeForCausalLM(config)
    ours = dict(model.named_parameters())
    peer.load_state_dict({theirs: ours[slot.param] for theirs, slot in slots(model.cfg, "fused").items()}, assign=True)
    with model.device:
        peer.model.rotary_emb = Qwen3MoeRotaryEmbedding(config)  # whose buffer no checkpoint holds
    return peer.eval()


def transformers_cache(cache: KVCache, context: int) -> Any:
    """The first `context` positions of our cache as transformers keeps them: [batch kv_head pos d_head] per layer."""
    from transformers import DynamicCache

    past = DynamicCache()
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):  # [batch kv_head pos d_head]
        past.update(keys[:, :, :context].contiguous(), values[:, :, :context].contiguous(), layer)
    return past
