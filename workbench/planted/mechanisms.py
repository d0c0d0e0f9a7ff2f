"""Small models whose answer has one known cause, set by hand: what an experiment finds can be checked.

Every prompt is fillers, a subject ("yes" or "no"), more fillers, a query; answer "A" belongs to yes and "B" to no.
Three circuits, each in a model that is otherwise busy with the fillers and never touches the answer:

  copying_head    one head carries the subject's sign to the query, where the unembedding reads it
  writing_mlp     the same head, then one expert (dense: one neuron) writes what it carried as the answer
  deciding_route  the same head, then the router reads the sign: one expert always writes A, another always B

Clean and corrupt differ by the sign of one axis alone, so that all norms stay equal and neighbours explain nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.config import LlamaConfig, Qwen3MoeConfig, RopeConfig
from workbench.errors import ConfigError
from workbench.models import Llama, build_model

ARCHITECTURES = ("llama", "qwen3_moe")
BOS, YES, NO, QUERY, A, B, FIRST_FILLER = 1, 3, 5, 6, 7, 8, 9
D_VOCAB, D_MODEL, D_HEAD = 24, 32, 8
# what the first axes of the residual stream mean; the rest carries the fillers
CONST, CONTENT, SUBJECT, ASKED, COPIED, ANSWER, IDLE = range(7)  # IDLE and the next three: one for each idle head
NOISE = slice(IDLE + 4, D_MODEL)
HEAD_LAYER, WRITER_LAYER = 1, 2
HEAD, KV_HEAD, IDLE_HEAD = 2, 1, 0
NEURON, EXPERT, EXPERT_B = 5, 3, 6
SLOW = D_HEAD // 2 - 1  # the rotary pair that hardly turns: a head that ignores distance reads there


@dataclass(frozen=True, eq=False)
class Mechanism:
    """A planted model and its task.

    `clean` and `corrupt` [pair pos] differ at `subject_pos` only; `correct` and `wrong` are the answers in the clean
    run. `writer` is what turns the carried sign into the answer: "head" (nothing does, the unembedding reads the head),
    "mlp" or "route". `head` of `head_layer` is the carrying head, `kv_head` its keys and values; `idle_head` attends
    just like it and writes where nobody reads. `experts` (sparse) or `neuron` (dense) of `writer_layer` write.
    """

    model: Llama
    clean: Tensor
    corrupt: Tensor
    subject_pos: int
    writer: str
    correct: int = A
    wrong: int = B
    head_layer: int = HEAD_LAYER
    head: int = HEAD
    kv_head: int = KV_HEAD
    idle_head: int = IDLE_HEAD
    writer_layer: int | None = None
    experts: tuple[int, ...] = ()
    neuron: int | None = None

    @property
    def query_pos(self) -> int:
        return self.clean.shape[1] - 1


def copying_head(architecture: str = "llama", n_pairs: int = 8, seed: int = 0) -> Mechanism:
    """The answer is what head `head` of layer `head_layer` brings from the subject."""
    return _mechanism(architecture, "head", n_pairs, seed)


def writing_mlp(architecture: str = "qwen3_moe", n_pairs: int = 8, seed: int = 0) -> Mechanism:
    """One expert, chosen in every run, or one neuron writes +answer or -answer: a matter of values, not of routing."""
    return _mechanism(architecture, "mlp", n_pairs, seed)


def deciding_route(n_pairs: int = 8, seed: int = 0) -> Mechanism:
    """Which of two experts runs decides the answer; each writes the same whatever it reads. Sparse only."""
    return _mechanism("qwen3_moe", "route", n_pairs, seed)


def _mechanism(architecture: str, writer: str, n_pairs: int, seed: int) -> Mechanism:
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"architecture: expected one of {', '.join(ARCHITECTURES)}, got {architecture!r}.")
    generator = torch.Generator().manual_seed(seed)
    sparse = architecture == "qwen3_moe"
    model = build_model(_config(sparse))
    with torch.no_grad():
        _background(model, generator)
        _embeddings(model, COPIED if writer == "head" else ANSWER, generator)
        blocks: Any = model.blocks
        _head(blocks[HEAD_LAYER].attn)
        if writer == "mlp":
            (_writing_expert if sparse else _writing_neuron)(blocks[WRITER_LAYER].mlp)
        if writer == "route":
            _deciding_router(blocks[WRITER_LAYER].mlp)
    clean, corrupt, subject_pos = _prompts(n_pairs, generator)
    experts = {"mlp": (EXPERT,), "route": (EXPERT, EXPERT_B)}.get(writer, ()) if sparse else ()
    return Mechanism(
        model, clean, corrupt, subject_pos, writer,
        writer_layer=None if writer == "head" else WRITER_LAYER,
        experts=experts, neuron=NEURON if writer == "mlp" and not sparse else None,
    )  # fmt: skip


def _config(sparse: bool) -> LlamaConfig | Qwen3MoeConfig:
    sizes = {"d_model": D_MODEL, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "d_head": D_HEAD, "d_mlp": 16}
    common: dict[str, Any] = {**sizes, "d_vocab": D_VOCAB, "n_ctx": 32, "norm_eps": 1e-6, "rope": RopeConfig(theta=1e9)}
    if not sparse:
        return LlamaConfig(**common)
    return Qwen3MoeConfig(**common, n_experts=8, k=2, d_expert=4, sparse_layers=(True,) * 4)


def _prompts(n_pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """Half of the clean prompts would be of either kind, but the metric has one sign: yes is clean, no corrupt."""
    n_before, n_after = 3, 2
    fillers = torch.randint(FIRST_FILLER, D_VOCAB, (n_pairs, n_before + n_after), generator=generator)
    ends = torch.tensor([[BOS, YES, QUERY]]).expand(n_pairs, 3)
    clean = torch.cat([ends[:, :1], fillers[:, :n_before], ends[:, 1:2], fillers[:, n_before:], ends[:, 2:]], dim=1)
    subject_pos = 1 + n_before
    corrupt = clean.clone()
    corrupt[:, subject_pos] = NO
    return clean, corrupt, subject_pos


def _background(model: Llama, generator: torch.Generator) -> None:
    """Every layer reads fillers and writes fillers: real activity, none of it about the answer."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        writes = name.endswith(("o_proj.weight", "down_proj.weight", "mlp.down"))
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.05 if writes else 0.2))
        axis = -2 if writes else -1  # where d_model is: [... d_model in] when writing, [... out d_model] when reading
        parameter.narrow(axis, 0, NOISE.start).zero_()


def _embeddings(model: Llama, read: int, generator: torch.Generator) -> None:
    table = torch.zeros(D_VOCAB, D_MODEL)
    noise = torch.randn(D_VOCAB, D_MODEL - NOISE.start, generator=generator)
    noise[NO] = noise[YES]
    table[:, NOISE] = noise / noise.norm(dim=1, keepdim=True)
    table[:, CONST] = 1
    table[[YES, NO], CONTENT] = torch.tensor([1.0, -1.0])
    table[[YES, NO], SUBJECT] = 1
    table[QUERY, ASKED] = 1
    model.embed.weight.copy_(table)
    model.unembed.weight.zero_()
    model.unembed.weight[:, NOISE] = 0.05 * noise
    model.unembed.weight[[A, B]] = 0
    model.unembed.weight[[A, B], read] = torch.tensor([2.0, -2.0])


def _head(attn: Any) -> None:
    """The carrying head, and one that attends alike; it and the group mates write to axes that nobody reads."""
    q, k, v, o = (getattr(attn, name).weight for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    for weight in (q, k, v, o):
        weight.zero_()
    for kv_head in range(2):
        k[kv_head * D_HEAD + SLOW, SUBJECT] = 4
        v[kv_head * D_HEAD, CONTENT] = 1
    for head in (HEAD, IDLE_HEAD):
        q[head * D_HEAD + SLOW, ASKED] = 4
    for head in range(4):
        o[COPIED if head == HEAD else IDLE + head, head * D_HEAD] = 0.4
    if attn.qk_norm:  # a normalised key has length sqrt(d_head): sharpen what the projections no longer can
        attn.q_norm.weight.fill_(4.0)


def _writing_neuron(mlp: Any) -> None:
    mlp.gate_proj.weight[NEURON], mlp.up_proj.weight[NEURON], mlp.down_proj.weight[:, NEURON] = 0, 0, 0
    mlp.gate_proj.weight[NEURON, CONST] = 1
    mlp.up_proj.weight[NEURON, COPIED] = 1
    mlp.down_proj.weight[ANSWER, NEURON] = 0.5


def _expert(mlp: Any, expert: int, reads: int, gain: float) -> None:
    """down(silu(const) * x[reads]) onto the answer axis, and nothing else."""
    d_expert = mlp.down.shape[-1]
    mlp.gate_up[expert], mlp.down[expert] = 0, 0
    mlp.gate_up[expert, 0, CONST] = 1
    mlp.gate_up[expert, d_expert, reads] = 1
    mlp.down[expert, ANSWER, 0] = gain


def _writing_expert(mlp: Any) -> None:
    _expert(mlp, EXPERT, COPIED, 0.5)
    mlp.router.weight[EXPERT] = 0
    mlp.router.weight[EXPERT, ASKED] = 3


def _deciding_router(mlp: Any) -> None:
    """At the query one of the two experts comes first and the other last, by the sign that the head brought."""
    for expert, sign in ((EXPERT, 1.0), (EXPERT_B, -1.0)):
        _expert(mlp, expert, CONST, 0.5 * sign)
        mlp.router.weight[expert] = 0
        mlp.router.weight[expert, ASKED] = 0.5
        mlp.router.weight[expert, COPIED] = 4 * sign
