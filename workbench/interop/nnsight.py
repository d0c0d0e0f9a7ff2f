"""nnsight on our models: every hook point is an envoy, and several prompts in one trace stay apart, routers too.

nnsight scopes each invoke to its rows of a tensor by the first axis. transformers' routers flatten batch and position
into one axis, so there every invoke sees, and can edit, the other prompts' routing; ours keep [batch pos expert].
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.capture import pad
from workbench.errors import ConfigError, HookError, ShapeError
from workbench.hooks import HookPoint
from workbench.models import Llama

try:
    from nnsight import NNsight
    from nnsight.intervention.envoy import Envoy, traceable
except ImportError as error:
    raise ConfigError(
        "nnsight: expected the package to be installed, got none. pip install 'llm-jp-4-workbench[interp]'."
    ) from error

# A lazy point is computed only while somebody wants it. What one of a group wants, all of it must be computed for,
# since the model decides about the group at once; the anchor is a point of the same pass that is never left out.
_GROUPS = {
    ("hook_attn_scores", "hook_pattern"): "hook_rot_k",
    ("hook_result",): "hook_z",
    ("hook_expert_pre", "hook_expert_pre_linear", "hook_expert_post", "hook_expert_out"): "hook_routing_weights",
}


# Weak on both sides: a wrapper holds its model, and neither should outlive its last user.
_WRAPPED: weakref.WeakKeyDictionary[Llama, weakref.ref[WorkbenchNNsight]] = weakref.WeakKeyDictionary()


class _Watcher:
    """Marks a watcher as ours, among those of a hook point."""

    def __init__(self, wants: Callable[[], bool]) -> None:
        self.wants = wants

    def __call__(self) -> bool:
        return self.wants()


def wrap(model: Llama) -> WorkbenchNNsight:
    """An NNsight model over `model`, sharing its weights: `wrap(model).blocks[0].mlp.hook_router_logits.output`.

    Wrapping a model again gives the same wrapper.

    A trace or invoke takes a text (with the model's tokenizer, no chat template), a list of token ids, a list of such
    lists, or a tensor [batch pos] with an optional `attention_mask`. Invokes of different lengths are padded on the
    left, so that position -1 is every prompt's last token; positions are counted over tokens, and values at padding
    mean nothing. `with wrapped.generate(prompt, max_new_tokens=5) as tracer` traces decoding; `tracer.iter` picks
    steps, and logits are at `unembed.output`. Points with a cost are computed only in traces that ask for them.

    Our own hooks on a point run first: nnsight sees what they returned. Raises HookError when `hook_expert_load` is
    read in a trace of several invokes, since it counts all prompts of the batch together.
    """
    known = _WRAPPED.get(model)
    if known is not None and (wrapped := known()) is not None:
        return wrapped
    wrapped = WorkbenchNNsight(model, envoys={HookPoint: PointEnvoy})
    for name, point in model.hook_dict.items():
        # the watchers of a wrapper that is gone would be asked at every pass for nothing
        point.watchers[:] = [old for old in point.watchers if not isinstance(old, _Watcher)]
        point.watchers.append(_Watcher(_watcher(wrapped.interleaver, name)))
    _WRAPPED[model] = weakref.ref(wrapped)
    return wrapped


class WorkbenchNNsight(NNsight):
    """NNsight with batching: prompts of several invokes become one left-padded batch."""

    @traceable
    def generate(self, *inputs: Any, **kwargs: Any) -> Any:
        """`model.generate`, traced when used in a `with` statement; `tracer.result` is the Generation."""
        return self._module.generate(*inputs, **kwargs)

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        if not inputs and "tokens" not in kwargs:
            return 0
        tokens = _tokens_of(inputs, kwargs)
        return tokens.shape[0] if isinstance(tokens, Tensor) else len(_token_rows(self._module, inputs, kwargs))

    def _batch(self, invokes: Sequence[tuple[tuple[Any, ...], dict[str, Any]]], fn: Any) -> tuple[Any, dict[str, Any]]:
        if not invokes:
            return (), {}
        inputs, kwargs = invokes[0]
        if len(invokes) == 1 and isinstance(_tokens_of(inputs, kwargs), Tensor):
            return inputs, kwargs  # as it is: it may be a residual stream with start_at_layer
        rows = [row for inputs, kwargs in invokes for row in _token_rows(self._module, inputs, kwargs)]
        tokens, mask = pad(rows, left=True)
        shared = _shared_kwargs([kwargs for _, kwargs in invokes])
        return (tokens,), shared if bool(mask.all()) else {**shared, "attention_mask": mask}


class PointEnvoy(Envoy):
    """The envoy of a hook point; refuses the one whose tensor has no batch axis to take apart."""

    @property
    def output(self) -> Any:
        """The point's tensor in this trace, this invoke's rows only."""
        self._check_scope()
        return Envoy.output.__get__(self)

    @output.setter
    def output(self, value: Any) -> None:
        self._check_scope()
        Envoy.output.__set__(self, value)

    def _check_scope(self) -> None:
        batcher = self.interleaver.batcher
        if self._module.shape == "expert" and batcher is not None and batcher.batching:
            raise HookError(
                f"{self._module.name}: expected a trace of one invoke, since it counts all prompts of the batch "
                "together, got several. Count hook_expert_ids instead."
            )


def _watcher(interleaver: Any, name: str) -> Callable[[], bool]:
    """Whether a trace wants hook point `name` in this pass.

    While a trace runs, points that cost nothing always report to it, because nnsight tells steps of generation apart
    by counting visits. A lazy point that nobody wants is not computed; its count is set from its anchor's.
    """
    prefix, _, leaf = f"model.{name}".rpartition(".")
    found = weakref.ref(interleaver)  # the model may outlive the wrapper
    group, anchor = next(((group, anchor) for group, anchor in _GROUPS.items() if leaf in group), ((), ""))
    if not group:
        return lambda: (running := found()) is not None and running.interleaving
    places = [f"{prefix}.{member}.{end}" for member in group for end in ("output", "input", "skip")]
    own = [f"{prefix}.{leaf}.{end}" for end in ("output", "input", "skip")]
    counter = f"{prefix}.{anchor}.output"

    def wants() -> bool:
        running = found()
        if running is None or not running.interleaving:
            return False
        wanted = any(place in running.parked or place in running.observers for place in places)
        visits = running.counts.get(counter, 0) - wanted  # a wanted point is about to be visited, and counted then
        for place in own:
            running.counts[place] = max(running.counts.get(place, 0), visits)
        return wanted

    return wants


def _tokens_of(inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return inputs[0] if inputs else kwargs["tokens"]


def _token_rows(model: Llama, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[list[int]]:
    """The token ids of every prompt of one invoke, its padding removed."""
    tokens = _tokens_of(inputs, kwargs)
    if isinstance(tokens, Tensor):
        return _tensor_rows(tokens, inputs[1] if len(inputs) > 1 else kwargs.get("attention_mask"))
    if isinstance(tokens, str):
        return [_encode(model, tokens)]
    if isinstance(tokens, list) and tokens and all(isinstance(row, str) for row in tokens):
        return [_encode(model, row) for row in tokens]
    if isinstance(tokens, list) and tokens:
        return [list(row) for row in (tokens if isinstance(tokens[0], list) else [tokens])]
    raise ShapeError(f"prompt: expected a text, token ids or a tensor [batch pos], got {type(tokens).__name__}.")


def _tensor_rows(tokens: Tensor, mask: Tensor | None) -> list[list[int]]:
    if tokens.ndim != 2:
        raise ShapeError(
            f"prompt: expected token ids [batch pos] in a trace of several invokes, got {tuple(tokens.shape)}. "
            "A residual stream with start_at_layer needs a trace of its own."
        )
    mask = torch.ones_like(tokens) if mask is None else mask
    return [row[keep].tolist() for row, keep in zip(tokens, mask.bool(), strict=True)]


def _encode(model: Llama, text: str) -> list[int]:
    if model.tokenizer is None:
        raise ConfigError("prompt: expected token ids (this model has no tokenizer), got a text. Pass ids.")
    ids: list[int] = model.tokenizer.to_tokens(text, bos=True)
    return ids


def _shared_kwargs(invokes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Keyword arguments other than the prompt's own, which the invokes must agree on."""
    rest = [{k: v for k, v in kwargs.items() if k not in ("tokens", "attention_mask")} for kwargs in invokes]
    for one, other in itertools.pairwise(rest):
        if one != other:
            raise ShapeError(f"invokes: expected the same options in every invoke of a trace, got {one} and {other}.")
    return rest[0]
