"""Grouped-query attention with hook points, through sdpa unless scores or pattern are hooked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.config import ModelConfig
from workbench.hooks import HookPoint
from workbench.models.cache import CacheRows, KVCache
from workbench.models.layers import Frame, Linear, rms_norm, rotary, substitute, wide

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")


class Attention(nn.Module):
    """Causal attention; `qk_norm` adds the per-head RMSNorm of Qwen3 between projection and rotation."""

    def __init__(self, cfg: ModelConfig, layer: int, qk_norm: bool, attn_impl: str) -> None:
        super().__init__()
        self.cfg, self.layer, self.attn_impl = cfg, layer, attn_impl
        self.q_proj = Linear(cfg.d_model, cfg.n_heads * cfg.d_head)
        self.k_proj = Linear(cfg.d_model, cfg.n_kv_heads * cfg.d_head)
        self.v_proj = Linear(cfg.d_model, cfg.n_kv_heads * cfg.d_head)
        self.o_proj = Linear(cfg.n_heads * cfg.d_head, cfg.d_model)
        self.qk_norm = qk_norm
        self.hook_q = HookPoint("batch pos head d_head")
        self.hook_k = HookPoint("batch pos kv_head d_head")
        self.hook_v = HookPoint("batch pos kv_head d_head")
        if qk_norm:
            self.q_norm, self.k_norm = HeadNorm(cfg.d_head), HeadNorm(cfg.d_head)
            self.hook_q_normed = HookPoint("batch pos head d_head")
            self.hook_k_normed = HookPoint("batch pos kv_head d_head")
        self.hook_rot_q = HookPoint("batch pos head d_head")
        self.hook_rot_k = HookPoint("batch pos kv_head d_head")
        quadratic = "eager attention; batch·head·query_pos·key_pos values"
        self.hook_attn_scores = HookPoint("batch head query_pos key_pos", cost=quadratic)
        self.hook_pattern = HookPoint("batch head query_pos key_pos", cost=quadratic)
        self.hook_z = HookPoint("batch pos head d_head")
        self.hook_result = HookPoint(
            "batch pos head d_model", cost="one output projection per head; batch·pos·head·d_model values"
        )

    def forward(self, x: Tensor, frame: Frame, cache: KVCache | None) -> Tensor:  # [batch pos d_model]
        q = self.hook_q(self._split(self.q_proj(x)))  # [batch pos head d_head]
        k = self.hook_k(self._split(self.k_proj(x)))  # [batch pos kv_head d_head]
        v = self.hook_v(self._split(self.v_proj(x)))  # [batch pos kv_head d_head]
        if self.qk_norm:
            q = self.hook_q_normed(rms_norm(q, self.q_norm.weight, self.cfg.norm_eps))
            k = self.hook_k_normed(rms_norm(k, self.k_norm.weight, self.cfg.norm_eps))
        q, k = self.hook_rot_q(rotary(q, frame)), self.hook_rot_k(rotary(k, frame))
        z = self.hook_z(self._attend_all(q, k, v, frame.mask, cache))  # [batch pos head d_head]
        out = self.o_proj(z.flatten(2))  # [batch pos d_model]
        if self.hook_result.listened:
            result = self._result(z)
            read = result.sum(2)  # before the hook, which may edit in place
            out = substitute(out, self.hook_result(result).sum(2), read)
        return out

    def _attend_all(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        if cache is None:
            return self._attend(q, k, v, mask)
        if not isinstance(cache, CacheRows):
            return self._attend(q, *cache.extend(self.layer, k, v), mask)
        rows = zip(q.split(1), *cache.extend_rows(self.layer, k, v), strict=True)  # each as long as its own sequence
        return torch.cat([self._attend(*row, mask) for row in rows])

    def _split(self, x: Tensor) -> Tensor:  # [batch pos (head d_head)] -> [batch pos head d_head]
        return x.view(*x.shape[:-1], -1, self.cfg.d_head)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [batch head pos d_head]
        if self.attn_impl == "eager" or self.hook_attn_scores.listened or self.hook_pattern.listened:
            return self._eager(q, k, v, mask).transpose(1, 2)
        if q.shape[2] == 1:  # heads that share keys become queries of one head, and nothing is repeated
            z = F.scaled_dot_product_attention(q.reshape(*k.shape[:2], -1, q.shape[3]), k, v, attn_mask=mask)
            return z.flatten(1, 2).unsqueeze(1)
        if mask is not None:  # with a mask, sdpa is slow on grouped heads on most devices
            k, v = self._repeat(k), self._repeat(v)
        causal = mask is None and q.shape[2] > 1
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=mask is None)
        return z.transpose(1, 2)

    def _eager(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = q @ self._repeat(k).transpose(2, 3) * self.cfg.d_head**-0.5
        if mask is None:
            n_query, n_key = scores.shape[2:]
            mask = torch.ones(n_query, n_key, dtype=torch.bool, device=q.device).tril(n_key - n_query)
        scores = self.hook_attn_scores(scores.masked_fill(~mask, -torch.inf))  # [batch head query_pos key_pos]
        pattern = self.hook_pattern(wide(scores).softmax(-1).to(q.dtype))  # same
        return pattern @ self._repeat(v)

    def _repeat(self, x: Tensor) -> Tensor:  # [batch kv_head pos d_head] -> [batch head pos d_head]
        return x.repeat_interleave(self.cfg.n_heads // self.cfg.n_kv_heads, dim=1)

    def _result(self, z: Tensor) -> Tensor:  # what each head adds: [batch pos head d_model]
        by_head = self.o_proj.weight.unflatten(1, (-1, self.cfg.d_head))  # [d_model head d_head]
        return torch.einsum("bphd,mhd->bphm", z, by_head)


class HeadNorm(nn.Module):
    """The weight of an RMSNorm over d_head."""

    def __init__(self, d_head: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_head))
