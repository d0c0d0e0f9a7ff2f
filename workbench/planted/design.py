"""What is planted: which expert has which role, on which axis of the residual stream, over which vocabulary.

Every planted feature owns one axis of the residual stream. Tokens or attention write the axis, router rows read it, so
the answer to "what is this expert for" is known before anything is measured. Families G1-G14 of the project's notes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from workbench.errors import ConfigError

AXES = (
    "lang", "context", "channel_mark", "channel_value", "mode", "effort_mark", "effort_value", "effort",
    "vocabulary", "bos", "const", "twin", "together", "path_in", "path", "write", "sink", "twin_out",
)  # fmt: skip
N_CONTENT = 96  # axes of no meaning: what makes tokens differ and experts compete
N_TOPICS = 8
FAMILY_SIZE = 64  # experts for which one set of language, mode and effort experts is planted

# role: (experts of it per set, does the number grow with E, the contrast it belongs to, its sign)
ROLES: dict[str, tuple[int, bool, str, int]] = {
    "ja_token": (2, True, "language_token", 1),
    "en_token": (1, True, "language_token", -1),
    "ja_context": (1, True, "language_context", 1),
    "en_context": (1, True, "language_context", -1),
    "writer": (1, False, "language_context", 1),  # reads the Japanese context, writes Japanese logits
    "analysis": (2, True, "mode", 1),
    "final": (1, True, "mode", -1),
    "effort": (1, True, "effort", 1),
    "vocabulary": (1, False, "", 0),
    "topic": (N_TOPICS, False, "", 0),
    "bos": (1, False, "", 0),
    "super": (1, False, "", 0),
    "idle": (1, False, "", 0),
    "rare": (1, False, "", 0),
    "twin": (2, False, "", 0),
    "together": (2, False, "", 0),
    "sender": (1, False, "", 0),
    "receiver": (1, False, "", 0),
}
KINDS = ("planted", "null", "upcycled")
PLACED = {"twin": "last", "sender": "first", "receiver": "second"}  # roles of one layer only; elsewhere plain experts


@dataclass(frozen=True)
class Design:
    """A checkpoint with known answers, before it is built.

    n_experts, k, n_layers: its shape, at least 32 experts and 2 layers. strength: what a planted router row weighs
    against the noise it competes with; the two channels are 20 standard deviations of a router logit apart at 1, 5 at
    0.25, 1 at 0.05, the two languages three quarters of that; 0 plants neither language nor mode nor effort. kind:
    "planted"; "null", the same without language, mode and effort but with vocabulary, topics and the rest; "upcycled",
    identical experts with arbitrary loads, as naive upcycling makes them (arXiv 2502.19261). seed: of every weight.
    """

    n_experts: int = 32
    k: int = 4
    n_layers: int = 2
    strength: float = 0.5
    kind: str = "planted"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}. Pass one of them.")
        for name, least in (("n_experts", 32), ("n_layers", 2), ("k", 2)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name}: expected at least {least}, which the planted roles need, got {getattr(self, name)}."
                )
        if self.k > self.n_experts // 4:
            raise ConfigError(f"k: expected at most a quarter of {self.n_experts} experts, got {self.k}. Lower k.")
        if not 0 <= self.strength <= 4:
            raise ConfigError(f"strength: expected 0 to 4, got {self.strength}. 0.05 is weak, 0.25 is strong.")

    @cached_property
    def roles(self) -> dict[str, tuple[int, ...]]:
        """Expert ids by role; ids in no role are plain experts."""
        sets = max(1, self.n_experts // FAMILY_SIZE)
        roles, first = {}, 0
        for role, (count, grows, _, _) in ROLES.items():
            n = count * sets if grows else count
            roles[role] = tuple(range(first, first + n))
            first += n
        return roles

    @property
    def axes(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(AXES)}

    @property
    def topic_axes(self) -> range:
        return range(len(AXES), len(AXES) + N_TOPICS)

    @property
    def content_axes(self) -> slice:
        return slice(len(AXES) + N_TOPICS, self.d_model)

    @property
    def d_model(self) -> int:
        return len(AXES) + N_TOPICS + N_CONTENT

    def layers_of(self, role: str) -> tuple[int, ...]:
        """The layers in which a role is planted."""
        places = {"first": (0,), "second": (1,), "last": (self.n_layers - 1,)}
        return places[PLACED[role]] if role in PLACED else tuple(range(self.n_layers))

    def truth(self) -> pl.DataFrame:
        """One row per (layer, expert): role ("plain" for none), contrast ("" for none) and sign of its effect.

        sign: +1 more in Japanese, in analysis, at high effort; -1 more in English, in final; 0 in no contrast.
        """
        by_place = {
            (layer, expert): role
            for role, experts in self.roles.items()
            for layer in self.layers_of(role)
            for expert in experts
        }
        live = self.kind == "planted" and self.strength > 0
        rows = []
        for layer in range(self.n_layers):
            for expert in range(self.n_experts):
                role = by_place.get((layer, expert), "plain") if self.kind != "upcycled" else "plain"
                _, _, contrast, sign = ROLES.get(role, (0, False, "", 0))
                planted = live or not contrast
                rows.append((layer, expert, role if planted else "plain", *((contrast, sign) if planted else ("", 0))))
        return pl.DataFrame(rows, schema=["layer", "expert", "role", "contrast", "sign"], orient="row")


class Vocabulary:
    """Token ids by what they are: specials, Japanese, English, shared; the same for every design."""

    PAD, BOS = 4, 1
    CHANNEL = {"analysis": 5, "final": 6}  # noqa: RUF012
    EFFORT = {"low": 7, "medium": 8, "high": 9}  # noqa: RUF012
    JA, EN, SHARED = np.arange(16, 256), np.arange(256, 496), np.arange(496, 536)
    N_FUNCTION = 6  # of each language: very frequent, without topic
    SIZE = 536

    @classmethod
    def words(cls, lang: str) -> np.ndarray:
        return cls.JA if lang == "ja" else cls.EN

    @classmethod
    def function_words(cls, lang: str) -> np.ndarray:
        return cls.words(lang)[: cls.N_FUNCTION]

    @classmethod
    def content_words(cls, lang: str) -> np.ndarray:
        return cls.words(lang)[cls.N_FUNCTION :]

    @classmethod
    def topic_of(cls, token_id: int) -> int | None:
        """The topic of a content word; None for every other token."""
        for lang in ("ja", "en"):
            words = cls.content_words(lang)
            if words[0] <= token_id <= words[-1]:
                return int(token_id - words[0]) % N_TOPICS
        return None

    @classmethod
    def flagged(cls, flag: str) -> np.ndarray:
        """Content words of both languages and every topic that carry the axis "twin", "together" or "path_in"."""
        nth = ("twin", "together", "path_in").index(flag)
        words = [cls.content_words(lang) for lang in ("ja", "en")]
        return np.concatenate([part[(np.arange(len(part)) // N_TOPICS) % 6 == nth] for part in words])

    @classmethod
    def name(cls, token_id: int) -> str:
        """A readable name, such as ja042 or digit03."""
        names = {cls.PAD: "<pad>", cls.BOS: "<bos>"}
        names |= {token: f"<{name}>" for name, token in (*cls.CHANNEL.items(), *cls.EFFORT.items())}
        if token_id in names:
            return names[token_id]
        for prefix, words in (("ja", cls.JA), ("en", cls.EN), ("digit", cls.SHARED)):
            if words[0] <= token_id <= words[-1]:
                return f"{prefix}{token_id - words[0]:03}"
        return f"<{token_id}>"
