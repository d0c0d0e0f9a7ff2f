"""How the facts are said: the templates of every relation, and a fact as a problem with its thinking."""

from __future__ import annotations

from functools import cache

from generator import facts
from generator.facts import Relation
from generator.parallel import LANGUAGES, Problem, capitalised, is_held_out

RELATIONS: tuple[Relation, ...] = (
    Relation(
        "capital",
        ("首都", "the capital"),
        facts.CAPITALS,
        {
            "ja": ("{s}の首都は{o}です。", "{s}という国の首都は{o}だ。", "{s}で政治の中心になっている都市は{o}です。"),
            "en": (
                "The capital of {s} is {o}.",
                "The capital city of {s} is {o}.",
                "The government of {s} sits in {o}.",
            ),
        },
        {
            "ja": ("{s}の首都はどこですか。", "{s}の首都を教えてください。", "{s}の首都の名前は何ですか。"),
            "en": ("What is the capital of {s}?", "Tell me the capital of {s}.", "Which city is the capital of {s}?"),
        },
    ),
    Relation(
        "antonym",
        ("反対の言葉", "the opposite"),
        facts.ANTONYMS,
        {
            "ja": ("「{s}」の反対は「{o}」です。", "「{s}」の反対の言葉は「{o}」だ。", "「{s}」の逆は「{o}」です。"),
            "en": (
                'The opposite of "{s}" is "{o}".',
                'The antonym of "{s}" is "{o}".',
                'The reverse of "{s}" is "{o}".',
            ),
        },
        {
            "ja": (
                "「{s}」の反対は何ですか。",
                "「{s}」の反対の言葉を教えてください。",
                "「{s}」の逆は何と言いますか。",
            ),
            "en": ('What is the opposite of "{s}"?', 'Tell me the antonym of "{s}".', 'What is the reverse of "{s}"?'),
        },
    ),
    Relation(
        "colour",
        ("色", "the colour"),
        facts.COLOURS,
        {
            "ja": ("{s}の色は{o}です。", "普通、{s}の色は{o}だ。", "{s}を絵にかくなら色は{o}です。"),
            "en": ("The colour of {s} is {o}.", "Usually the colour of {s} is {o}.", "People paint {s} in {o}."),
        },
        {
            "ja": ("{s}は何色ですか。", "{s}の色を教えてください。", "{s}はどんな色をしていますか。"),
            "en": ("What colour is {s}?", "Tell me the colour of {s}.", "Which colour does {s} have?"),
        },
    ),
    Relation(
        "kind",
        ("仲間", "the kind"),
        facts.KINDS,
        {
            "ja": ("{s}は{o}の仲間です。", "私たちは{s}を{o}の仲間だと考えます。", "人は{s}を{o}の一種だと言います。"),
            "en": (
                "{s} is a kind of {o}.",
                "We think of {s} as a kind of {o}.",
                "People say that {s} is a kind of {o}.",
            ),
        },
        {
            "ja": ("{s}は何の仲間ですか。", "{s}の種類を教えてください。", "{s}はどの仲間に入りますか。"),
            "en": ("What kind of thing is {s}?", "Tell me the kind of {s}.", "Which group does {s} belong to?"),
        },
    ),
    Relation(
        "family",
        ("家族の呼び方", "the family word"),
        facts.FAMILY,
        {
            "ja": ("{s}は{o}です。", "{s}のことを{o}と言います。", "{s}を呼ぶ言葉は{o}だ。"),
            "en": ("My {s} is my {o}.", "Your {s} is called your {o}.", "The word for my {s} is {o}."),
        },
        {
            "ja": ("{s}は誰ですか。", "{s}を何と言いますか。", "{s}の呼び方を教えてください。"),
            "en": ("Who is my {s}?", "What do you call your {s}?", "Tell me the word for my {s}."),
        },
    ),
    Relation(
        "next_day",
        ("次の曜日", "the next day"),
        facts.successors(facts.WEEKDAYS, 1),
        {
            "ja": ("{s}の次の日は{o}です。", "{s}の翌日は{o}だ。", "{s}の後に来るのは{o}です。"),
            "en": ("The day after {s} is {o}.", "After {s} comes {o}.", "If today is {s}, tomorrow is {o}."),
        },
        {
            "ja": ("{s}の次の日は何曜日ですか。", "{s}の翌日を教えてください。", "今日が{s}なら、明日は何曜日ですか。"),
            "en": ("What day comes after {s}?", "Tell me the day after {s}.", "Today is {s}. What day is tomorrow?"),
        },
    ),
    Relation(
        "day_before",
        ("前の曜日", "the day before"),
        facts.successors(facts.WEEKDAYS, -1),
        {
            "ja": ("{s}の前の日は{o}です。", "{s}の前日は{o}だ。", "{s}の前に来るのは{o}です。"),
            "en": ("The day before {s} is {o}.", "Before {s} comes {o}.", "If today is {s}, yesterday was {o}."),
        },
        {
            "ja": (
                "{s}の前の日は何曜日ですか。",
                "{s}の前日を教えてください。",
                "今日が{s}なら、昨日は何曜日でしたか。",
            ),
            "en": (
                "What day comes before {s}?",
                "Tell me the day before {s}.",
                "Today is {s}. What day was yesterday?",
            ),
        },
    ),
    Relation(
        "next_month",
        ("次の月", "the next month"),
        facts.successors(facts.MONTHS, 1),
        {
            "ja": ("{s}の次の月は{o}です。", "{s}の翌月は{o}だ。", "{s}が終わると{o}です。"),
            "en": ("The month after {s} is {o}.", "After {s} comes {o}.", "When {s} ends, the next month is {o}."),
        },
        {
            "ja": ("{s}の次の月は何月ですか。", "{s}の翌月を教えてください。", "{s}が終わると何月ですか。"),
            "en": ("What month comes after {s}?", "Tell me the month after {s}.", "Which month follows {s}?"),
        },
    ),
    Relation(
        "season",
        ("季節", "the season"),
        facts.month_seasons(),
        {
            "ja": ("日本の{s}の季節は{o}です。", "{s}は季節でいうと{o}だ。", "{s}になると日本は{o}です。"),
            "en": ("In Japan {s} is in {o}.", "The season of {s} is {o}.", "When {s} comes, Japan is in {o}."),
        },
        {
            "ja": ("日本では{s}の季節は何ですか。", "{s}の季節を教えてください。", "{s}はどの季節ですか。"),
            "en": ("In Japan, which season is {s}?", "Tell me the season of {s}.", "What season is {s} in?"),
        },
    ),
    Relation(
        "number_word",
        ("数の言葉", "the number word"),
        facts.NUMBER_WORDS,
        {
            "ja": ("{s}を漢字で書くと{o}です。", "{s}は漢字で{o}だ。", "{s}という数の漢字は{o}です。"),
            "en": ("The number {s} in words is {o}.", "We write {s} in words as {o}.", "In words, {s} is {o}."),
        },
        {
            "ja": ("{s}を漢字で書いてください。", "{s}は漢字でどう書きますか。", "{s}の漢字を教えてください。"),
            "en": ("Write {s} in words.", "How do you write {s} in words?", "Tell me the words for {s}."),
        },
    ),
    Relation(
        "product",
        ("かけ算", "the product"),
        facts.PRODUCTS,
        {
            "ja": ("{s} の答えは {o} です。", "{s} を計算すると {o} だ。", "九九では {s} は {o} だ。"),
            "en": ("The product {s} is {o}.", "Multiplying {s} gives {o}.", "In the times table {s} is {o}."),
        },
        {
            "ja": ("{s} はいくつですか。", "{s} を計算してください。", "{s} の答えは何ですか。"),
            "en": ("What is {s}?", "Calculate {s}.", "Find the product {s}."),
        },
    ),
)


STEPS: dict[str, tuple[str, ...]] = {
    "ja": ("{t}を聞かれている。", "聞かれているのは「{s}」だ。", "答えは{o}。"),
    "en": ("The question asks for {t}.", "It is about: {s}.", "The answer is {o}."),
}
CHECK: dict[str, tuple[str, ...]] = {
    "ja": ("確かめる。", "「{s}」と「{o}」は合う。", "だから{o}でよい。"),
    "en": ("Let me check.", '"{s}" and "{o}" go together.', "So the answer {o} is right."),
}


# Wordings that held-out facts are measured in: the first one is also how questions are answered, so it is always seen.
RECALLED = (1, 2)


def statement_held_out(relation: Relation, row: int, template: int, lang: str) -> bool:
    """Whether this fact in this wording and language is left out of the lists of facts; its other wordings are not."""
    return is_held_out("statement", relation.name, row, template, lang)


def statement(relation: Relation, row: int, template: int, lang: str) -> str:
    """One fact as one sentence."""
    i = LANGUAGES.index(lang)
    subject, obj = relation.rows[row]
    return capitalised(relation.statements[lang][template].format(s=subject[i], o=obj[i]))


def recall_prompt(relation: Relation, row: int, template: int, lang: str) -> tuple[str, str]:
    """The sentence split before its object: what a base model is given, and what it must write."""
    i = LANGUAGES.index(lang)
    subject, obj = relation.rows[row]
    before, after = relation.statements[lang][template].split("{o}")
    return capitalised(before.format(s=subject[i])).rstrip(" "), obj[i] + after


@cache
def fact_problem(relation: Relation, row: int) -> Problem:
    """One fact as a question.  Its operands are never held out: only wordings are (see `conversation_held_out`)."""
    subject, obj = relation.rows[row]
    words = {lang: {"s": subject[i], "o": obj[i], "t": relation.topic[i]} for i, lang in enumerate(LANGUAGES)}

    def said(texts: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        return {lang: tuple(text.format(**words[lang]) for text in texts[lang]) for lang in LANGUAGES}

    return Problem(
        task=relation.name,
        key=f"{relation.name}:{subject[1]}",
        held_out=False,
        questions=said(relation.questions),
        hint={"ja": f"{obj[0]}。", "en": f"{capitalised(obj[1])}."},
        steps=said(STEPS),
        check=said(CHECK),
        answer={lang: statement(relation, row, 0, lang) for lang in LANGUAGES},
        value={"ja": obj[0], "en": obj[1]},
    )
