"""What is planted is there: each role is checked against the model's own tensors, not against a statistic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from workbench.activations import ActivationCache
from workbench.errors import ConfigError
from workbench.io.saving import save_model
from workbench.io.weights import load_model
from workbench.models import Qwen3Moe
from workbench.planted.design import ROLES, Design, Vocabulary
from workbench.planted.documents import language_documents, sequences
from workbench.planted.experts import plant

DESIGN = Design(n_experts=32, k=4, n_layers=3, strength=1.0)


@pytest.fixture(scope="module")
def planted() -> Qwen3Moe:
    return plant(DESIGN)


def run(model: Qwen3Moe, ids: list[list[int]], *leaves: str) -> ActivationCache:
    wanted = tuple(f"hook_{leaf}" for leaf in leaves)
    with torch.inference_mode():
        return model.run_with_cache(torch.tensor(ids), names_filter=lambda name: name.endswith(wanted))[1]


def document(lang: str, channel: str = "analysis", effort: str = "medium", n: int = 30, seed: int = 0) -> list[int]:
    """Words of one language, then five words that both languages have."""
    words = np.random.default_rng(seed).choice(Vocabulary.content_words(lang), n)
    header = [Vocabulary.BOS, Vocabulary.EFFORT[effort], Vocabulary.CHANNEL[channel]]
    return [*header, *words.tolist(), *Vocabulary.SHARED[:5].tolist()]


def logit_shift(model: Qwen3Moe, one: list[int], other: list[int], role: str, layer: int = 0) -> float:
    """How much higher the role's first expert scores on the last token of `one` than of `other`."""
    logits = run(model, [one, other], "router_logits")["router_logits", layer][:, -1]
    centred = logits - logits.median(dim=-1, keepdim=True).values
    return float(centred[0, DESIGN.roles[role][0]] - centred[1, DESIGN.roles[role][0]])


def chosen(model: Qwen3Moe, ids: list[list[int]], layer: int) -> torch.Tensor:
    """bool [batch pos expert]"""
    picked = run(model, ids, "expert_ids")["expert_ids", layer]
    return torch.nn.functional.one_hot(picked, DESIGN.n_experts).sum(-2).bool()


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(
    ("role", "one", "other"),
    [
        ("ja_context", document("ja"), document("en")),
        ("en_context", document("en"), document("ja")),
        ("writer", document("ja"), document("en")),
        ("analysis", document("ja", "analysis"), document("ja", "final")),
        ("final", document("en", "final"), document("en", "analysis")),
        ("effort", document("ja", effort="high"), document("ja", effort="medium")),
        ("effort", document("ja", effort="medium"), document("ja", effort="low")),
    ],
)
def test_context_moves_the_same_token(planted: Qwen3Moe, layer: int, role: str, one: list, other: list) -> None:
    assert one[-1] == other[-1]
    assert logit_shift(planted, one, other, role, layer) > 2


def test_language_by_token_reads_the_token_alone(planted: Qwen3Moe) -> None:
    ja, en = Vocabulary.content_words("ja")[50], Vocabulary.content_words("en")[50]
    assert logit_shift(planted, [Vocabulary.BOS, ja], [Vocabulary.BOS, en], "ja_token") > 2
    assert logit_shift(planted, [Vocabulary.BOS, en], [Vocabulary.BOS, ja], "en_token") > 2
    assert abs(logit_shift(planted, document("ja"), document("en"), "ja_token")) < 0.5


def test_topics_vocabulary_and_bos_go_to_their_experts(planted: Qwen3Moe) -> None:
    words = Vocabulary.content_words("en")
    for topic, expert in enumerate(DESIGN.roles["topic"]):
        of_topic = words[topic::8][:20].tolist()
        others = words[(topic + 4) % 8 :: 8][:20].tolist()
        share = chosen(planted, [of_topic, others], layer=0).float().mean(1)[:, expert]
        assert share[0] > share[1] + 0.2
    assert chosen(planted, [Vocabulary.function_words("ja").tolist()], 0)[0, :, DESIGN.roles["vocabulary"][0]].all()
    at_bos = chosen(planted, [document("ja")], 0)[0]
    for role in ("bos", "super"):
        assert at_bos[0, DESIGN.roles[role][0]]
    assert not at_bos[1:, DESIGN.roles["super"][0]].any()


def test_idle_writes_nothing_rare_much_and_super_massively(planted: Qwen3Moe) -> None:
    ids = sequences(language_documents(12, 60, seed=1))
    cache = run(planted, ids, "expert_ids", "expert_out")
    picked, norms = cache["expert_ids", 0], cache["expert_out", 0].norm(dim=-1)
    load = torch.bincount(picked.flatten(), minlength=DESIGN.n_experts) / picked[..., 0].numel()
    of = {role: picked == DESIGN.roles[role][0] for role in ("idle", "rare", "super")}
    assert load[DESIGN.roles["idle"][0]] > 1.5 * DESIGN.k / DESIGN.n_experts
    assert load[DESIGN.roles["rare"][0]] < 0.5 * DESIGN.k / DESIGN.n_experts
    assert norms[of["idle"]].max() == 0
    plain = norms[picked >= sum(map(len, DESIGN.roles.values()))]
    assert norms[of["rare"]].median() > 5 * plain.median()
    assert norms[of["super"]].min() > 100 * plain.max()
    assert cache["expert_out", 0][of["super"]][:, DESIGN.content_axes].abs().max() == 0


def test_twins_are_one_expert_twice_and_always_together(planted: Qwen3Moe) -> None:
    one, two = DESIGN.roles["twin"]
    moe = planted.blocks[2].mlp
    assert torch.equal(moe.router.weight[one], moe.router.weight[two])
    assert torch.equal(moe.gate_up[one], moe.gate_up[two])
    assert torch.equal(moe.down[one], moe.down[two])
    on_flagged = chosen(planted, [Vocabulary.flagged("twin").tolist()], 2)[0]
    assert on_flagged[:, one].all()
    assert torch.equal(on_flagged[:, one], on_flagged[:, two])


def test_the_pair_is_chosen_together_beyond_chance(planted: Qwen3Moe) -> None:
    one, two = DESIGN.roles["together"]
    both = chosen(planted, sequences(language_documents(240, 60, seed=2)), 1).flatten(0, 1)
    picked = both.float().mean(0)
    assert (both[:, one] & both[:, two]).float().mean() > 2 * picked[one] * picked[two]


def test_the_path_leads_from_sender_to_receiver(planted: Qwen3Moe) -> None:
    (sender,), (receiver,) = DESIGN.roles["sender"], DESIGN.roles["receiver"]
    ids = sequences(language_documents(20, 60, seed=3))
    sent, received = chosen(planted, ids, 0)[..., sender], chosen(planted, ids, 1)[..., receiver]
    assert received[sent].float().mean() > received[~sent].float().mean() + 0.5

    def silence(router_logits: torch.Tensor, hook: object) -> torch.Tensor:
        return router_logits.index_fill(-1, torch.tensor([sender]), -torch.inf)

    with planted.hooks([("blocks.0.mlp.hook_router_logits", silence)]):
        cut = chosen(planted, ids, 1)[..., receiver]
    assert cut[sent].float().mean() < received[sent].float().mean() - 0.5


def test_the_writer_writes_japanese(planted: Qwen3Moe) -> None:
    """Known attribution: its output unembeds to -1 for every English word and +1 elsewhere."""
    (writer,) = DESIGN.roles["writer"]
    cache = run(planted, [document("ja")], "expert_ids", "expert_out")
    written = cache["expert_out", 2][cache["expert_ids", 2] == writer]
    logits = written @ planted.unembed.weight.T  # [slot d_vocab], before the final norm
    amount = written[:, DESIGN.axes["write"]]
    assert (amount > 0).all()
    assert amount.median() > 5
    expected = amount[:, None].repeat(1, Vocabulary.SIZE)
    expected[:, Vocabulary.EN] *= -1
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)


def test_nobody_writes_on_an_axis_that_routers_read_unless_it_is_his_role(planted: Qwen3Moe) -> None:
    writers = {role for role in ("writer", "sender", "twin", "super")}
    for layer, block in enumerate(planted.blocks):
        named = torch.ones(DESIGN.d_model, dtype=torch.bool)
        named[DESIGN.content_axes] = False
        loud = block.mlp.down[:, named].abs().amax(dim=(1, 2)).nonzero().flatten().tolist()
        expected = sorted(e for role in writers if layer in DESIGN.layers_of(role) for e in DESIGN.roles[role])
        assert loud == expected


def test_strength_zero_and_null_plant_no_context(planted: Qwen3Moe) -> None:
    for design in (Design(strength=0.0), Design(kind="null")):
        model = plant(design)
        assert abs(logit_shift(model, document("ja"), document("en"), "ja_context")) < 0.5
        assert abs(logit_shift(model, document("ja", "analysis"), document("ja", "final"), "analysis")) < 0.5
        assert set(design.truth().filter(pl.col("contrast") != "")["role"]) == set()
        assert "vocabulary" in set(design.truth()["role"])


def test_upcycled_experts_are_one_expert_and_unevenly_used() -> None:
    model = plant(Design(kind="upcycled"))
    for block in model.blocks:
        assert torch.equal(block.mlp.down, block.mlp.down[:1].expand_as(block.mlp.down))
        assert torch.equal(block.mlp.gate_up, block.mlp.gate_up[:1].expand_as(block.mlp.gate_up))
    ids = run(model, sequences(language_documents(10, 60)), "expert_ids")["expert_ids", 0]
    assert torch.bincount(ids.flatten(), minlength=32).max() / ids[..., 0].numel() > 0.9
    assert set(Design(kind="upcycled").truth()["role"]) == {"plain"}


@pytest.mark.parametrize("shape", [(64, 8), (128, 8)])
def test_the_truth_covers_every_expert_at_larger_shapes(shape: tuple[int, int]) -> None:
    design = Design(*shape, n_layers=2)
    truth = design.truth()
    assert truth.height == 2 * shape[0]
    assert truth.select("layer", "expert").is_duplicated().sum() == 0
    assert set(truth["role"]) == {*ROLES, "plain"}
    in_layers = truth.group_by("role").agg(pl.col("layer").unique().sort())
    placed = {role: tuple(layers) for role, layers in in_layers.rows() if role != "plain"}
    assert placed == {role: design.layers_of(role) for role in ROLES}
    model = plant(design)
    assert run(model, [document("ja")], "expert_ids")["expert_ids", 0].shape == (1, 38, shape[1])


def test_it_is_an_ordinary_checkpoint(planted: Qwen3Moe, tmp_path: Path) -> None:
    saved = load_model(save_model(planted, tmp_path / "planted"), progress=False)
    ids = torch.tensor(sequences(language_documents(2, 20)))
    with torch.inference_mode():
        assert torch.equal(saved(ids), planted(ids))


def test_the_same_seed_gives_the_same_weights() -> None:
    for one, other in zip(plant(Design(seed=3)).parameters(), plant(Design(seed=3)).parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(plant(Design(seed=3)).embed.weight, plant(Design(seed=4)).embed.weight)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"n_experts": 16}, "n_experts: expected at least 32"),
        ({"n_layers": 1}, "n_layers: expected at least 2"),
        ({"k": 9}, "k: expected at most a quarter of 32"),
        ({"strength": -1.0}, "strength: expected 0 to 4"),
        ({"kind": "real"}, "kind: expected one of planted, null, upcycled"),
    ],
)
def test_designs_that_cannot_be_built_are_refused(wrong: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Design(**wrong)
