"""Conversation that is no exercise: greetings, questions about the model itself, and telling about a thing."""

from __future__ import annotations

from random import Random

from generator.parallel import LANGUAGES, Problem
from generator.relations import RELATIONS, statement

# (ways to say it, answer), each in Japanese and English.
SMALL_TALK = (
    (
        (("こんにちは。", "やあ、こんにちは。"), ("Hello.", "Hi there.")),
        ("こんにちは。何をしましょうか。", "Hello. What can I do for you?"),
    ),
    (
        (("おはよう。", "おはようございます。"), ("Good morning.", "Good morning to you.")),
        ("おはようございます。", "Good morning."),
    ),
    (
        (("ありがとう。", "ありがとうございました。"), ("Thank you.", "Thanks a lot.")),
        ("どういたしまして。", "You are welcome."),
    ),
    (
        (("さようなら。", "また明日。"), ("Goodbye.", "See you tomorrow.")),
        ("さようなら。また話しましょう。", "Goodbye. Let us talk again."),
    ),
    (
        (("あなたは誰ですか。", "自己紹介をしてください。"), ("Who are you?", "Please introduce yourself.")),
        ("私は小さい言語モデルです。", "I am a small language model."),
    ),
    (
        (("何ができますか。", "あなたにできることは何ですか。"), ("What can you do?", "Tell me what you can do.")),
        ("簡単な計算と短い質問に答えることができます。", "I can do simple calculations and answer short questions."),
    ),
    (
        (("元気ですか。", "調子はどうですか。"), ("How are you?", "How is it going?")),
        ("はい、元気です。", "I am well, thank you."),
    ),
)
TOLD_ABOUT = tuple(relation for relation in RELATIONS if relation.name in ("capital", "kind"))


def draw_small_talk(rng: Random) -> Problem:
    """A greeting or a question about the model."""
    index = rng.randrange(len(SMALL_TALK))
    said, reply = SMALL_TALK[index]
    answer = dict(zip(LANGUAGES, reply, strict=True))
    return Problem(
        task="small_talk",
        key=f"small_talk:{index}",
        held_out=False,
        questions=dict(zip(LANGUAGES, said, strict=True)),
        hint={"ja": "短く返す。", "en": "A short reply."},
        steps={
            "ja": ("これは計算ではなく会話だ。", "短く、丁寧に返す。"),
            "en": ("This is talk, not a calculation.", "I reply briefly and politely."),
        },
        check={"ja": ("確かめる。", "失礼なところはない。"), "en": ("Let me check.", "Nothing in it is rude.")},
        answer=answer,
        value=answer,
    )


def draw_telling(rng: Random) -> Problem:
    """Tell me about France, about a dog: the answer is the one fact known of it."""
    relation = rng.choice(TOLD_ABOUT)
    row = rng.randrange(len(relation.rows))
    subject, _ = relation.rows[row]
    answer = {lang: statement(relation, row, 0, lang) for lang in LANGUAGES}
    return Problem(
        task="telling",
        key=f"telling:{subject[1]}",
        held_out=False,
        questions={
            "ja": (f"{subject[0]}について教えてください。", f"{subject[0]}について一つ話してください。"),
            "en": (f"Tell me about {subject[1]}.", f"Tell me one thing about {subject[1]}."),
        },
        hint={"ja": f"{subject[0]}の話。", "en": f"About {subject[1]}."},
        steps={
            "ja": (f"{subject[0]}について知っていることを一つ選ぶ。", f"{relation.topic[0]}を話そう。"),
            "en": (f"I choose one thing I know about {subject[1]}.", f"I will tell {relation.topic[1]}."),
        },
        check={"ja": ("確かめる。", "これは事実だ。"), "en": ("Let me check.", "This is a fact.")},
        answer=answer,
        value=answer,
    )
