"""A Qwen3-MoE checkpoint whose experts do what its design says, written weight by weight; nothing is trained.

Attention of layer 0 carries context: one head averages the language of all tokens so far, one copies the value of the
channel token, one that of the effort token. So language by context, mode and effort act on tokens that are themselves
the same. Router rows read these axes; experts write on axes of no meaning, except where writing is their role.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from workbench.config import Qwen3MoeConfig, RopeConfig
from workbench.models import Qwen3Moe, build_model
from workbench.planted.design import N_CONTENT, Design, Vocabulary

D_HEAD, D_EXPERT, N_CTX = 24, 16, 512
COUPLING = 1.5  # of a planted router row, at strength 1
NOISE = 0.5 * 4  # of every router row over the content axes
SLOT = D_HEAD // 2 - 1  # the rotary pair that turns slowest; with this theta it does not turn within N_CTX
MASSIVE = 2000.0  # what the super expert writes, against a residual stream of norm about 10

# role: (axis its router row reads, weight, does the weight grow with strength)
READS: dict[str, tuple[str, float, bool]] = {
    "ja_token": ("lang", COUPLING, True),
    "en_token": ("lang", -COUPLING, True),
    "ja_context": ("context", COUPLING, True),
    "en_context": ("context", -COUPLING, True),
    "writer": ("context", COUPLING, True),
    "analysis": ("mode", COUPLING, True),
    "final": ("mode", -COUPLING, True),
    "effort": ("effort", COUPLING, True),
    "vocabulary": ("vocabulary", 3.0, False),
    "bos": ("bos", 2.0, False),
    "super": ("bos", 2.0, False),
    "idle": ("const", 2.0, False),
    "rare": ("const", -0.4, False),
    "twin": ("twin", 8.0, False),
    "together": ("together", 2.0, False),
    "sender": ("path_in", 8.0, False),
    "receiver": ("path", 2.0, False),
}
# role: (axis its expert writes, how much)
WRITES = {"writer": ("write", 3.0), "sender": ("path", 10.0), "twin": ("twin_out", 30.0), "super": ("sink", MASSIVE)}


@torch.no_grad()
def plant(design: Design) -> Qwen3Moe:
    """Build the checkpoint of a design, in float32 on the CPU; `workbench.save_model` writes it to disk.

    The answers are `design.truth()`. It has no tokenizer: its documents come from `workbench.planted.documents`.
    """
    cfg = Qwen3MoeConfig(
        d_model=design.d_model, n_layers=design.n_layers, n_heads=3, n_kv_heads=3, d_head=D_HEAD, d_mlp=D_EXPERT,
        d_vocab=Vocabulary.SIZE, n_ctx=N_CTX, norm_eps=1e-6, rope=RopeConfig(theta=1e9), pad_id=Vocabulary.PAD,
        n_experts=design.n_experts, k=design.k, d_expert=D_EXPERT, sparse_layers=(True,) * design.n_layers,
    )  # fmt: skip
    model = build_model(cfg, moe_impl="sorted")
    assert isinstance(model, Qwen3Moe)
    random = torch.Generator().manual_seed(design.seed)
    for parameter in model.parameters():
        parameter.fill_(1.0 if parameter.ndim == 1 else 0.0)
    _embed(model.embed.weight, design, random)
    _unembed(model.unembed.weight, design, random)
    if design.kind == "planted":
        _carry_context(model, design)
    for layer in range(design.n_layers):
        moe: Any = model.blocks[layer].mlp
        _experts(moe.gate_up, moe.down, design, layer, random)
        _route(moe.router.weight, design, layer, random)
    model.source = f"planted-{design.n_experts}x{design.k}-{design.kind}"
    return model


def _embed(weight: Tensor, design: Design, random: torch.Generator) -> None:  # [d_vocab d_model]
    axis, words = design.axes, Vocabulary
    weight[:, design.content_axes] = torch.randn(words.SIZE, N_CONTENT, generator=random) * 0.5
    weight[:, axis["const"]] = 1.0
    weight[:, axis["channel_mark"]] = weight[:, axis["effort_mark"]] = -1.0
    for lang, value in (("ja", 1.0), ("en", -1.0)):
        weight[words.words(lang), axis["lang"]] = value
        for token_id in words.content_words(lang):
            weight[token_id, design.topic_axes[words.topic_of(int(token_id)) or 0]] = 1.0
    weight[words.function_words("ja"), axis["vocabulary"]] = 3.0
    for flag in ("twin", "together", "path_in"):
        weight[words.flagged(flag), axis[flag]] = 1.5
    weight[words.BOS, axis["bos"]] = 6.0
    for name, tokens, values in (
        ("channel", words.CHANNEL, {"analysis": 1.0, "final": -1.0}),
        ("effort", words.EFFORT, {"low": -1.0, "medium": 0.0, "high": 1.0}),
    ):
        for label, token_id in tokens.items():
            weight[token_id, axis[f"{name}_mark"]] = 1.0
            weight[token_id, axis[f"{name}_value"]] = values[label]


def _unembed(weight: Tensor, design: Design, random: torch.Generator) -> None:  # [d_vocab d_model]
    weight[:, design.content_axes] = torch.randn(Vocabulary.SIZE, N_CONTENT, generator=random) * 0.1
    weight[:, design.axes["write"]] = 1.0  # every word but the English ones
    weight[Vocabulary.EN, design.axes["write"]] = -1.0
    weight[::2, design.axes["twin_out"]] = 0.5  # every other word, of whatever language


def _carry_context(model: Qwen3Moe, design: Design) -> None:
    """Head 0: the mean language so far. Heads 1 and 2: the value of the channel and of the effort token."""
    attn: Any = model.blocks[0].attn
    axis = design.axes
    for head, (source, target) in enumerate((("lang", "context"), ("channel", "mode"), ("effort", "effort"))):
        first = head * D_HEAD
        if head:  # the mark decides where to look; without it (head 0) every position counts alike
            attn.q_proj.weight[first + SLOT, axis["const"]] = 1.0
            attn.k_proj.weight[first + SLOT, axis[f"{source}_mark"]] = 1.0
        attn.v_proj.weight[first, axis["lang" if not head else f"{source}_value"]] = 1.0
        attn.o_proj.weight[axis[target], first] = 3.0
    attn.q_norm.weight.fill_(2.0)  # sharp: the marked token takes nearly all attention


def _route(weight: Tensor, design: Design, layer: int, random: torch.Generator) -> None:  # [expert d_model]
    if design.kind == "upcycled":  # loads as they come, and next to nothing that depends on the token
        weight[:, design.axes["const"]] = torch.randn(design.n_experts, generator=random) * 2
        weight[:, design.content_axes] = torch.randn(design.n_experts, N_CONTENT, generator=random) * 0.02
        return
    noise = torch.randn(design.n_experts, N_CONTENT, generator=random) * NOISE / math.sqrt(N_CONTENT)
    weight[:, design.content_axes] = noise
    for role, experts in _planted(design, layer):
        if role == "topic":
            for place, expert in zip(design.topic_axes, experts, strict=True):
                weight[expert, place] = 2.0
            continue
        axis, value, grows = READS[role]
        scale = (design.strength if design.kind == "planted" else 0.0) if grows else 1.0
        weight[list(experts), design.axes[axis]] += value * scale
        if role in ("twin", "super"):  # nothing else decides about them, so that both twins are chosen alike
            weight[list(experts), design.content_axes] = 0.0


def _experts(gate_up: Tensor, down: Tensor, design: Design, layer: int, random: torch.Generator) -> None:
    """gate_up [expert 2·d_expert d_model], down [expert d_model d_expert]."""
    gate_up.copy_(torch.randn(gate_up.shape, generator=random) * 0.15)
    down[:, design.content_axes] = torch.randn(design.n_experts, N_CONTENT, D_EXPERT, generator=random) * 0.05
    if design.kind == "upcycled":
        gate_up.copy_(gate_up[:1].expand_as(gate_up))
        down.copy_(down[:1].expand_as(down))
        return
    for role, experts in _planted(design, layer):
        chosen = list(experts)
        if role == "idle":
            down[chosen] = 0.0
        if role == "rare":
            down[chosen] *= 12
        if role in WRITES:  # one hidden unit that is always on, writing one axis and nothing else
            axis, amount = WRITES[role]
            gate_up[chosen] = down[chosen] = 0.0
            gate_up[chosen, 0, design.axes["const"]] = 2.0
            gate_up[chosen, D_EXPERT, design.axes["const"]] = 1.0
            down[chosen, design.axes[axis], 0] = amount


def _planted(design: Design, layer: int) -> Iterable[tuple[str, tuple[int, ...]]]:
    return ((role, experts) for role, experts in design.roles.items() if layer in design.layers_of(role))
