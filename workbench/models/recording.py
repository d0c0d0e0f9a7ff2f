"""What a model did while it ran, kept as it happened: routing and activations of every token, without a second pass.

A recorder listens last at its hook points, so it sees the outcome of interventions and edits. During decoding it only
keeps references; every FLUSH steps it compacts them, many steps and layers in one operation, into memory or a folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.activations import unknown_name
from workbench.errors import ConfigError, HookError
from workbench.hooks import HookFn, HookPoint, only_looks

if TYPE_CHECKING:
    from workbench.models.llama import Llama

FLUSH = 32  # decode steps between two compactions
ROUTING = "routing"
ROUTER_POINTS = ("router_logits", "expert_ids", "routing_weights")
ROUTING_VALUES = ("expert_ids", "routing_weights", "router_entropy", "router_margin", "router_lse", "router_mass")


@dataclass(frozen=True)
class Record:
    """What was recorded at columns [batch pos ...] of `Generation.tokens`; padding holds values of no meaning.

    activations: by hook name [batch pos ...], in the model's dtype. routed_layers, n_experts: of the routing, which is
    empty unless it was asked for. routing: expert_ids (int16) and routing_weights (float32) [batch pos layer k] by
    descending weight; router_entropy in nats, router_margin (NaN without one), router_lse and router_mass
    [batch pos layer], float32, as in axes.ROUTING_COLUMNS.
    """

    activations: dict[str, Tensor] = field(default_factory=dict)
    routing: dict[str, Tensor] = field(default_factory=dict)
    routed_layers: tuple[int, ...] = ()
    n_experts: int = 0


class Recorder:
    """Listens at the points of `record`: "routing", full hook names, or short ones such as "resid_post" (all layers).

    With a `folder`, what was recorded goes to files there as it comes, and the record is mapped from them.
    Raises HookError for names that do not exist and for points whose tensor has no [batch pos] axes, ConfigError for
    the routing of a dense model.
    """

    def __init__(self, model: Llama, record: Sequence[str], folder: str | Path | None = None) -> None:
        names = _checked(record)
        self.layers = _need_routed_layers(model) if ROUTING in names else ()
        self.n_experts = model.cfg.n_experts if self.layers else 0  # type: ignore[union-attr]
        self.points = [point for name in names if name != ROUTING for point in _points(model, name)]
        self.on_disk = folder is not None
        self._sink = _Files(Path(folder)) if folder is not None else _Memory()
        self._copies = False
        self._held: dict[str, list[Tensor]] = {}
        self._slots: Slots | None = None
        self._model, self._steps = model, 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        routers = [
            self._model.hook_dict[f"blocks.{layer}.mlp.hook_{leaf}"] for leaf in ROUTER_POINTS for layer in self.layers
        ]
        points = list(dict.fromkeys([*routers, *self.points]))
        # one storage may pass several points: where others listen, what was seen here has to be copied
        self._copies = any(point.listened for point in self._model.hook_dict.values())
        with self._model.hooks([(point.name, self._keeper(point)) for point in points]):
            yield

    def _keeper(self, point: HookPoint) -> HookFn:
        held = self._held[point.name] = []

        def keep(x: Tensor, hook: HookPoint) -> None:
            if self._slots is not None:
                self._slots.write(hook.name, x)
            else:
                held.append(x.detach().clone() if self._copies else x)

        return only_looks(keep)

    def into_slots(self, device: torch.device) -> None:
        """From now on passes are steps that write what they show into buffers; `next_slot` ends each on the device."""
        self.flush()
        self._slots = Slots(device)

    def next_slot(self) -> None:
        assert self._slots is not None
        self._slots.place += 1

    def step(self, n_pos: int) -> None:
        """A pass over `n_pos` columns has ended."""
        self._steps += 1
        if n_pos > 1 or self._steps >= FLUSH:
            self.flush()
            if self._slots is not None:
                self._slots.place.zero_()

    def flush(self) -> None:
        """Compact what the passes since the last time left."""
        if not self._steps:
            return
        if self._slots is not None:
            for name, held in self._held.items():
                held.append(self._slots.taken(name, self._steps))
        self._steps = 0
        for point in self.points:
            self._sink.append(point.name, torch.cat(self._held[point.name], dim=1))
        if self.layers:
            for name, values in self._routing().items():
                self._sink.append(f"{ROUTING}.{name}", values)
        for held in self._held.values():
            held.clear()

    def finish(self) -> Record:
        """Everything recorded. Outside inference mode, so that the tensors may be used in any way."""
        self.flush()
        found = self._sink.finish()
        routing = {name: found.pop(f"{ROUTING}.{name}") for name in ROUTING_VALUES if f"{ROUTING}.{name}" in found}
        self._sink.describe({"routed_layers": self.layers, "n_experts": self.n_experts})
        return Record(found, routing, self.layers, self.n_experts)

    def _routing(self) -> dict[str, Tensor]:  # [batch pos layer ...] each
        logits, ids, weights = (self._by_layer(leaf) for leaf in ROUTER_POINTS)
        return routing_values(logits, ids, weights)

    def _by_layer(self, leaf: str) -> Tensor:
        steps = [torch.cat(self._held[f"blocks.{layer}.mlp.hook_{leaf}"], dim=1) for layer in self.layers]
        return torch.stack(steps, dim=2)


class Slots:
    """Room for FLUSH steps of each point [batch FLUSH ...], filled at a place that lies on the device."""

    def __init__(self, device: torch.device) -> None:
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self._buffers: dict[str, Tensor] = {}

    def write(self, name: str, x: Tensor) -> None:  # [batch 1 ...]
        if name not in self._buffers:
            self._buffers[name] = x.new_zeros(x.shape[0], FLUSH, *x.shape[2:])
        self._buffers[name].index_copy_(1, self.place, x.detach())

    def taken(self, name: str, n_steps: int) -> Tensor:  # [batch n_steps ...]
        return self._buffers[name][:, :n_steps]


def routing_values(logits: Tensor, ids: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """ROUTING_VALUES by name, of router logits [... expert], expert ids [... k] and routing weights [... k]."""
    logits, ids = logits.float(), ids.long()
    return {
        "expert_ids": ids.to(torch.int16),
        "routing_weights": weights.float(),
        "router_entropy": router_entropy(logits),
        "router_margin": router_margin(logits, ids.shape[-1]),
        "router_lse": logits.logsumexp(-1),
        "router_mass": logits.softmax(-1).gather(-1, ids).sum(-1),
    }


def router_entropy(logits: Tensor) -> Tensor:  # [... expert] -> [...]
    """Entropy in nats of the softmax over all experts."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)  # 0 ln 0 is 0: a knocked-out expert's logit is -inf


def router_margin(logits: Tensor, k: int) -> Tensor:  # [... expert] -> [...]
    """The k-th largest logit minus the next; NaN when there is no next that could be chosen."""
    if k == logits.shape[-1]:
        return torch.full(logits.shape[:-1], torch.nan)
    top = logits.topk(k + 1, dim=-1).values
    return (top[..., k - 1] - top[..., k]).where(top[..., k] > -torch.inf, torch.nan)


class _Memory:
    """Keeps what is appended [batch pos ...] on the CPU."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def append(self, name: str, values: Tensor) -> None:
        self._parts.setdefault(name, []).append(values.cpu())

    def finish(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts, dim=1) for name, parts in self._parts.items()}

    def describe(self, facts: dict[str, Any]) -> None:
        """Nothing to write down."""


class _Files:
    """Appends to one raw file per name, position after position, so that a long run needs no memory for it."""

    def __init__(self, folder: Path) -> None:
        if (folder / "record.json").exists():
            raise ConfigError(f"record_to: expected a folder without a record, got {folder}. Name another.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"record_to: expected a folder to write to, got {folder} ({error.strerror}).") from None
        self.folder = folder
        self._shapes: dict[str, list[int]] = {}  # [pos batch ...]
        self._dtypes: dict[str, str] = {}
        self._begun: set[str] = set()

    def append(self, name: str, values: Tensor) -> None:
        rows = values.transpose(0, 1).contiguous().cpu()  # [pos batch ...]
        shape = self._shapes.setdefault(name, [0, *rows.shape[1:]])
        self._dtypes[name] = str(rows.dtype).removeprefix("torch.")
        with open(self.folder / f"{name}.bin", "ab" if shape[0] else "wb") as file:
            file.write(rows.flatten().view(torch.uint8).numpy().data)
        shape[0] += rows.shape[0]

    def finish(self) -> dict[str, Tensor]:
        self.describe({})
        return {name: _mapped(self.folder, name, self._shapes[name], self._dtypes[name]) for name in self._shapes}

    def describe(self, facts: dict[str, Any]) -> None:
        files = {name: {"shape": self._shapes[name], "dtype": self._dtypes[name]} for name in self._shapes}
        text = json.dumps({"axes": "pos batch ...", **facts, "files": files}, indent=1)
        (self.folder / "record.json").write_text(text, encoding="utf-8")


def open_record(folder: str | Path) -> Record:
    """A record that `generate(..., record_to=folder)` wrote, mapped from its files: reading a part reads only that."""
    folder = Path(folder)
    if not (folder / "record.json").is_file():
        raise ConfigError(f"{folder}: expected a finished record, got no record.json. Name the folder of record_to.")
    facts = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    found = {name: _mapped(folder, name, file["shape"], file["dtype"]) for name, file in facts["files"].items()}
    routing = {name: found.pop(f"{ROUTING}.{name}") for name in ROUTING_VALUES if f"{ROUTING}.{name}" in found}
    return Record(found, routing, tuple(facts["routed_layers"]), facts["n_experts"])


def _mapped(folder: Path, name: str, shape: list[int], dtype: str) -> Tensor:  # [batch pos ...]
    size = 1
    for n in shape:
        size *= n
    flat = torch.from_file(str(folder / f"{name}.bin"), shared=False, size=size, dtype=getattr(torch, dtype))
    return flat.view(shape).transpose(0, 1)


def _checked(record: Sequence[str]) -> list[str]:
    if isinstance(record, str) or not isinstance(record, Sequence) or not all(isinstance(name, str) for name in record):
        raise HookError(f'record: expected a list such as ["routing", "resid_post"], got {record!r}.')
    return list(dict.fromkeys(record))


def _points(model: Llama, name: str) -> list[HookPoint]:
    """The points of a full name, or of a short one in every layer that has it."""
    full = [name] if name in model.hook_dict else []
    names = full or [known for known in model.hook_dict if f".{known}".endswith((f".{name}", f".hook_{name}"))]
    if not names:
        raise HookError(unknown_name(name, [ROUTING, *model.hook_dict], "record"))
    points = [model.hook_dict[found] for found in names]
    for point in points:
        if not point.shape.startswith("batch pos"):
            raise HookError(
                f"record: expected points with axes batch pos, got {point.name} [{point.shape}]. Use a hook instead."
            )
    return points


def routed_layers(model: Llama) -> tuple[int, ...]:
    """The layers with experts; none in a dense model."""
    return tuple(layer for layer, sparse in enumerate(getattr(model.cfg, "sparse_layers", ())) if sparse)


def _need_routed_layers(model: Llama) -> tuple[int, ...]:
    layers = routed_layers(model)
    if not layers:
        raise ConfigError(
            "record: expected a model with experts for 'routing', got one without. Record activations by name instead."
        )
    return layers
