"""What a model is: frozen configurations, and how many parameters they make. `hf_config` reads and writes them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from workbench.errors import ConfigError


def check_positive(name: str, value: object) -> None:
    """Raises ConfigError unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{name}: expected a positive number, got {value!r}. Check config.json.")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: plain, linearly interpolated (2306.15595) or Llama 3.1's frequency-dependent scaling."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_n_ctx: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("default", "linear", "llama3"):
            raise ConfigError(
                f"rope_type: expected one of default, linear, llama3, got {self.kind!r}. No other is implemented."
            )
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_n_ctx"):
            check_positive(f"rope {name}", getattr(self, name))
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"rope low_freq_factor: expected less than high_freq_factor {self.high_freq_factor}, "
                f"got {self.low_freq_factor}. Check config.json."
            )


@dataclass(frozen=True)
class LlamaConfig:
    """A dense decoder of the Llama architecture. Sizes are counts; `n_ctx` is the longest trained sequence."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool = False
    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)
    pad_id: int | None = None

    model_type: ClassVar[str] = "llama"
    is_moe: ClassVar[bool] = False

    _COUNTS: ClassVar[tuple[str, ...]] = (
        "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_mlp", "d_vocab", "n_ctx",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in self._COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}: expected a positive integer, got {value!r}. Check config.json.")
        check_positive("norm_eps", self.norm_eps)
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_kv_heads: expected a divisor of {self.n_heads} heads, got {self.n_kv_heads}. Check config.json."
            )
        if self.d_head % 2:
            raise ConfigError(f"d_head: expected an even number (rotary pairs), got {self.d_head}. Check config.json.")

    @property
    def n_params(self) -> int:
        """Number of weights, tied ones counted once."""
        embeddings = self.n_embedding_params * (1 if self.tie_embeddings else 2)
        return embeddings + self.d_model + sum(self._block_params(layer) for layer in range(self.n_layers))

    @property
    def n_activated_params(self) -> int:
        """Number of weights that act on one token: all of them in a dense model."""
        return self.n_params

    @property
    def n_embedding_params(self) -> int:
        """The input embedding alone, as the published model cards count it."""
        return self.d_vocab * self.d_model

    def _attention_params(self) -> int:
        return self.d_model * self.d_head * (2 * self.n_heads + 2 * self.n_kv_heads)

    def _block_params(self, layer: int) -> int:
        return 2 * self.d_model + self._attention_params() + 3 * self.d_model * self.d_mlp


@dataclass(frozen=True)
class Qwen3MoeConfig(LlamaConfig):
    """A sparse decoder of the Qwen3-MoE architecture: qk-norm in attention, routed experts in place of the MLP.

    `sparse_layers[layer]` tells whether that layer has experts; the others have a dense MLP of width `d_mlp`.
    """

    n_experts: int = 0
    k: int = 0
    d_expert: int = 0
    norm_topk_prob: bool = True
    sparse_layers: tuple[bool, ...] = ()
    aux_loss_coef: float = 0.001

    model_type: ClassVar[str] = "qwen3_moe"
    is_moe: ClassVar[bool] = True
    _COUNTS: ClassVar[tuple[str, ...]] = (*LlamaConfig._COUNTS, "n_experts", "k", "d_expert")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k > self.n_experts:
            raise ConfigError(f"k: expected 1 to {self.n_experts} experts per token, got {self.k}. Check config.json.")
        if len(self.sparse_layers) != self.n_layers:
            raise ConfigError(
                f"sparse_layers: expected one flag for each of {self.n_layers} layers, got {len(self.sparse_layers)}."
            )

    @property
    def n_activated_params(self) -> int:
        """Number of weights that act on one token: k of the experts of each sparse layer, and everything else."""
        idle = (self.n_experts - self.k) * self._expert_params()
        return self.n_params - idle * sum(self.sparse_layers)

    def _expert_params(self) -> int:
        return 3 * self.d_model * self.d_expert

    def _block_params(self, layer: int) -> int:
        shared = 2 * self.d_model + self._attention_params() + 2 * self.d_head
        if self.sparse_layers[layer]:
            return shared + self.n_experts * (self.d_model + self._expert_params())
        return shared + 3 * self.d_model * self.d_mlp


ModelConfig = LlamaConfig | Qwen3MoeConfig


def config_dict(config: ModelConfig) -> dict[str, Any]:
    """The configuration as plain values, for manifests and hashes."""
    return {"model_type": config.model_type, **asdict(config)}
