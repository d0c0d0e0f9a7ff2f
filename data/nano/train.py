"""Train the nano models: `python data/nano/train.py [--only NAME ...] [--steps N] [--out DIR] [--threads N]`.

Checkpoints and the states of runs under way go to DIR. A run that was stopped continues when it is started again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from batches import Batch, pool
from muon import Muon
from progress import quick_accuracy
from recipe import RECIPES, TOKENIZER, Recipe, model_config
from torch import Tensor

from workbench.chat import harmony_template
from workbench.hooks import HookPoint
from workbench.io.saving import save_model
from workbench.io.tokens import Tokenizer
from workbench.models import Llama, Qwen3Moe, build_model, init_weights

IMPLEMENTATION = "grouped_mm"  # the faster one for gradients in float32 on a CPU
WARM_UP = 50  # steps
DECAY = 0.3  # share of the steps, at the end, over which the learning rate falls to a twentieth
AUX_LOSS, Z_LOSS = 1e-2, 1e-3  # as LLM-jp-4's mixture of experts was trained
SAVE_EVERY = 120.0  # seconds
LOG_EVERY, TRY_EVERY = 50, 200  # steps


def schedule(step: int, steps: int) -> float:
    """The learning rate as a share of its peak: linear warm-up, constant, linear decay."""
    left = (steps - step) / max(1.0, DECAY * steps)
    return min(1.0, (step + 1) / WARM_UP, max(0.05, left))


def router_loss(logits: Tensor, valid: Tensor, k: int) -> Tensor:
    """Load-balancing loss for top-k (2101.03961) and z-loss (2202.08906) of one layer, weighted.

    logits: [batch pos expert]; padding, where `valid` [batch pos] is False, does not count.
    """
    logits = logits[valid].float()
    probs = logits.softmax(-1)
    n_experts = logits.shape[-1]
    share = torch.bincount(probs.topk(k, dim=-1).indices.flatten(), minlength=n_experts) / (k * len(probs))
    balance = n_experts * (share * probs.mean(0)).sum()
    return AUX_LOSS * balance + Z_LOSS * logits.logsumexp(-1).square().mean()


def losses(model: Llama, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean next-token loss in nats over the learned positions, and the routers' losses summed over layers."""
    routers: list[Tensor] = []
    hooks: list[tuple[str, Callable[[Tensor, HookPoint], None]]] = []
    if isinstance(model, Qwen3Moe):
        k = model.cfg.k

        def listen(logits: Tensor, hook: HookPoint) -> None:
            routers.append(router_loss(logits, batch.valid, k))

        hooks = [(f"blocks.{layer}.mlp.hook_router_logits", listen) for layer in range(model.cfg.n_layers)]
    with model.hooks(fwd_hooks=hooks):
        resid = model(batch.tokens, stop_at_layer=model.cfg.n_layers)
    learned = batch.targets >= 0  # the unembedding is a third of the work, so it is left out elsewhere
    logits = model.unembed(model.ln_final(resid[learned]))
    return F.cross_entropy(logits, batch.targets[learned]), sum(routers, torch.zeros(()))


def make_optimizers(model: Llama) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices of attention and dense MLPs, AdamW for everything else.

    With AdamW alone the models needed about a fifth more tokens for the same loss. Experts stay with AdamW.
    """
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and name.startswith("blocks") and "router" not in name]
    others = [p for _, p in named if not any(p is matrix for matrix in matrices)]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
    ]
    return {
        "adamw": torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True),
        "muon": Muon(matrices, weight_decay=0.01, momentum=0.95),
    }


class Run:
    """One recipe under way: model, optimiser, and where in the stream of examples it stands.

    The weights are kept in float32 in the state file; the checkpoint beside it is rounded to bfloat16 at the end.
    """

    def __init__(self, recipe: Recipe, out: Path, steps: int | None) -> None:
        self.recipe, self.out, self.steps = recipe, out, steps or recipe.steps
        self.tokenizer = Tokenizer.from_file(TOKENIZER)
        cfg = model_config(recipe.name, self.tokenizer.d_vocab)
        self.model = init_weights(build_model(cfg, moe_impl=IMPLEMENTATION), recipe.seed)
        self.model.tokenizer = self.tokenizer
        self.optimizers = make_optimizers(self.model)
        self.step, self.seconds = 0, 0.0
        # a continued run reads documents that the run before it has not read
        self.next_example = 0 if recipe.start is None else 10_000_000
        self.used = 0  # batches of the pool that begins there
        self._restore()

    def _state_file(self, name: str) -> Path:
        return self.out / f"{name}.state.pt"

    def _restore(self) -> None:
        """Continue this run, or start from the finished run before it."""
        mine = self._state_file(self.recipe.name)
        if mine.is_file():
            state = torch.load(mine, weights_only=True)
            self.model.load_state_dict(state["model"])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state[name])
            self.step, self.next_example, self.seconds = state["step"], state["next_example"], state["seconds"]
            self.used = state["used"]
        elif self.recipe.start is not None:
            before = self._state_file(self.recipe.start)
            if not before.is_file():
                raise SystemExit(
                    f"{self.recipe.name}: expected the finished run of {self.recipe.start}, got no {before}."
                )
            self.model.load_state_dict(torch.load(before, weights_only=True)["model"])

    def save_state(self) -> None:
        """Write everything that `_restore` needs; the file is replaced in one go."""
        path = self._state_file(self.recipe.name)
        state: dict[str, Any] = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        state |= {"model": self.model.state_dict(), "step": self.step, "seconds": self.seconds}
        torch.save(state | {"next_example": self.next_example, "used": self.used}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def batches(self) -> Iterator[Batch]:
        """Batches without end; the state is saved between pools, and at the end of the run."""
        saved = time.monotonic()
        while True:
            ready, following = pool(
                self.tokenizer, self.recipe.seed, self.next_example, self.recipe.chat_share, self.recipe.batch_tokens
            )
            for batch in ready[self.used :]:
                self.used += 1
                yield batch
            self.next_example, self.used = following, 0
            if time.monotonic() - saved > SAVE_EVERY:
                self.save_state()
                saved = time.monotonic()

    def train_step(self, batch: Batch) -> float:
        """One update; returns the next-token loss."""
        cycle = max(1, self.steps // self.recipe.cycles)
        share = schedule(self.step % cycle, cycle)
        for name, peak in (("adamw", self.recipe.adamw_lr), ("muon", self.recipe.muon_lr)):
            for group in self.optimizers[name].param_groups:
                group["lr"] = peak * share
        loss, router = losses(self.model, batch)
        (loss + router).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.model.zero_grad()
        self.step += 1
        return loss.item()

    def train(self) -> None:
        """All remaining steps, then the checkpoint."""
        recent, tokens, started = [], 0, time.monotonic()
        batches = self.batches()
        while self.step < self.steps:
            batch = next(batches)
            recent.append(self.train_step(batch))
            tokens += int(batch.valid.sum())
            if self.step % LOG_EVERY == 0 or self.step == self.steps:
                elapsed = time.monotonic() - started
                self.seconds += elapsed
                self._log(sum(recent) / len(recent), tokens / elapsed)
                recent, tokens, started = [], 0, time.monotonic()
        self.save_state()
        self.save_checkpoint()

    def _log(self, loss: float, speed: float) -> None:
        entry = {"step": self.step, "of": self.steps, "loss": round(loss, 4), "tokens_per_s": round(speed)}
        entry["minutes"] = round(self.seconds / 60, 1)
        if self.step % TRY_EVERY == 0:
            entry |= quick_accuracy(self.model, self.recipe.is_thinking)
        print(json.dumps({"run": self.recipe.name} | entry), flush=True)

    def save_checkpoint(self) -> None:
        """Write the model as bfloat16 in Hugging Face layout."""
        model = build_model(self.model.cfg, dtype=torch.bfloat16)
        model.load_state_dict(self.model.state_dict())
        model.tokenizer = self.tokenizer
        model.chat_template = harmony_template() if self.recipe.is_thinking else None
        save_model(model, self.out / self.recipe.name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the nano models.")
    only = "train these alone, in the order of the recipes; a thinking model needs the state of its base"
    parser.add_argument("--only", choices=RECIPES, action="append", help=only)
    parser.add_argument("--steps", type=int, help="fewer steps than the recipe's, to try things out")
    parser.add_argument("--out", type=Path, default=Path("runs/nano"), help="where states and checkpoints go")
    parser.add_argument("--threads", type=int, default=1, help="the committed models were trained with 1 each")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, recipe in RECIPES.items():
        if not args.only or name in args.only:
            Run(recipe, args.out, args.steps).train()


if __name__ == "__main__":
    main()
