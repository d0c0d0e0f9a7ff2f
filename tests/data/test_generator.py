"""The generated text: repeatable, parallel in both languages, right, and split without leaks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import sha256

import pytest
from generator import arithmetic, documents, facts, reasoning, relations, stories, talk
from generator.arithmetic import draw
from generator.conversations import (
    FACT_TASKS,
    INSTRUCTIONS,
    TASKS,
    conversation,
    conversation_held_out,
    draw_task,
    thinking,
)
from generator.documents import document
from generator.parallel import EFFORTS, LANGUAGES, Problem, pair_held_out, seeded

SEED = 20261123  # of the trained models
DOCUMENTS, CONVERSATIONS = "111d991cf71bb5ad", "18001c133340e315"  # what they read, in short
JAPANESE = re.compile(r"[ぁ-んァ-ヴ一-龥]")
EQUATION = re.compile(r"(?<![\d+-] )\b(\d+) ([+-]) (\d+) = (\d+)\b")
DRAWS = (
    arithmetic.draw_addition,
    arithmetic.draw_subtraction,
    reasoning.draw_comparison,
    reasoning.draw_sorting,
    reasoning.draw_sequence,
    reasoning.draw_story,
    reasoning.draw_people,
    talk.draw_small_talk,
    talk.draw_telling,
    documents.draw_fact,
)


def problems(n: int = 60) -> Iterator[Problem]:
    for make in DRAWS:
        rng = seeded("test", make.__name__)
        yield from (make(rng) for _ in range(n))


def texts_of(problem: Problem, lang: str) -> list[str]:
    parts = [*problem.questions[lang], problem.hint[lang], *problem.steps[lang], *problem.check[lang]]
    return [*parts, problem.answer[lang]]


def equations(text: str) -> list[tuple[int, str, int, int]]:
    return [(int(a), sign, int(b), int(c)) for a, sign, b, c in EQUATION.findall(text)]


def test_documents_depend_on_seed_and_number_alone() -> None:
    alone = document(3, 17)
    for index in range(10):
        document(3, index)
    assert document(3, 17) == alone
    assert document(4, 17) != alone


def test_documents_have_not_changed_since_the_models_were_trained() -> None:
    texts = "".join(document(SEED, index).text for index in range(200))
    talks = "".join(repr(conversation(SEED, 10_000_000 + index)) for index in range(200))
    assert sha256(texts.encode()).hexdigest()[:16] == DOCUMENTS
    assert sha256(talks.encode()).hexdigest()[:16] == CONVERSATIONS


def test_every_kind_of_document_comes_in_both_languages() -> None:
    found = {(d.lang, d.kind) for d in (document(0, index) for index in range(600))}
    assert found == {(lang, kind) for lang in LANGUAGES for kind in documents.KINDS}


def test_problems_say_the_same_in_both_languages() -> None:
    for problem in problems():
        for field in (problem.questions, problem.steps, problem.check):
            assert len(field["ja"]) == len(field["en"]), problem.key
        for lang in LANGUAGES:
            assert problem.value[lang] in problem.answer[lang]
        figures = {lang: sorted(re.findall(r"\d+", " ".join(texts_of(problem, lang)))) for lang in LANGUAGES}
        if problem.task in ("addition", "subtraction", "comparison", "sorting", "sequence"):
            assert figures["ja"] == figures["en"]


def test_each_language_keeps_to_its_script() -> None:
    for problem in problems():
        assert not JAPANESE.search(" ".join(texts_of(problem, "en"))), problem.key
        assert all(JAPANESE.search(question) for question in problem.questions["ja"])
        assert JAPANESE.search(problem.answer["ja"])


def test_equations_in_the_text_are_right() -> None:
    n_checked = 0
    for index in range(400):
        for a, sign, b, c in equations(document(0, index).text):
            assert c == (a + b if sign == "+" else a - b)
            n_checked += 1
    assert n_checked > 300


@pytest.mark.parametrize(("a", "b"), [(27, 15), (5, 3), (90, 9), (0, 0), (49, 50), (38, 2)])
def test_written_calculation_shows_every_step(a: int, b: int) -> None:
    added, subtracted = arithmetic.addition(a, b), arithmetic.subtraction(a + b, b)
    assert added.value["en"] == str(a + b)
    assert subtracted.value["ja"] == str(a)
    assert ("carry" in " ".join(added.steps["en"])) == (a % 10 + b % 10 >= 10)
    assert ("borrow" in " ".join(subtracted.steps["en"])) == ((a + b) % 10 < b % 10)


def test_tables_are_parallel_and_unambiguous() -> None:
    for relation in relations.RELATIONS:
        subjects = [subject for subject, _ in relation.rows]
        assert len({ja for ja, _ in subjects}) == len({en for _, en in subjects}) == len(subjects), relation.name
        assert len(relation.statements["ja"]) == len(relation.statements["en"]) == 3
        assert len(relation.questions["ja"]) == len(relation.questions["en"])
        meanings: dict[str, set[str]] = {}
        for _, (ja, en) in relation.rows:
            meanings.setdefault(en, set()).add(ja)
        assert all(len(words) == 1 for words in meanings.values())


@pytest.mark.parametrize(
    ("n", "ja", "en"), [(0, "零", "zero"), (10, "十", "ten"), (23, "二十三", "twenty-three"), (90, "九十", "ninety")]
)
def test_number_words(n: int, ja: str, en: str) -> None:
    assert facts.number_word(n) == (ja, en)


def test_number_words_end_at_a_hundred() -> None:
    with pytest.raises(ValueError, match="expected 0 <= n < 100, got 100"):
        facts.number_word(100)


def test_the_calendar_is_a_cycle() -> None:
    following = {relation.name: dict(relation.rows) for relation in relations.RELATIONS}
    assert following["next_day"]["日曜日", "Sunday"] == ("月曜日", "Monday")
    assert following["day_before"]["月曜日", "Monday"] == ("日曜日", "Sunday")
    assert following["next_month"]["十二月", "December"] == ("一月", "January")
    assert following["season"]["一月", "January"] == ("冬", "winter")


def test_a_recall_prompt_and_its_answer_make_up_the_statement() -> None:
    for relation in relations.RELATIONS:
        for lang in LANGUAGES:
            for template in range(3):
                before, after = relations.recall_prompt(relation, 0, template, lang)
                whole = relations.statement(relation, 0, template, lang)
                assert whole in (before + after, f"{before} {after}")


def test_a_number_family_is_held_out_as_a_whole() -> None:
    for a in range(50):
        for b in range(50):
            sides = {pair_held_out(a, b), pair_held_out(b, a)}
            sides |= {arithmetic.addition(a, b).held_out, arithmetic.subtraction(a + b, b).held_out}
            assert len(sides) == 1
            assert not (a < 10 and b < 10 and sides == {True})


def test_training_text_never_shows_a_held_out_sum() -> None:
    shown = [document(1, index).text for index in range(1500)]
    talks = [conversation(1, index) for index in range(800)]
    shown += [f"{talk.user}\n{talk.analysis}\n{talk.final}" for talk in talks]
    for text in shown:
        for a, sign, b, c in equations(text):
            assert not pair_held_out(b, c if sign == "-" else a), (a, sign, b)


def test_training_documents_never_show_a_held_out_wording() -> None:
    held_out = {
        relations.statement(relation, row, template, lang)
        for relation in relations.RELATIONS
        for row in range(len(relation.rows))
        for lang in LANGUAGES
        for template in relations.RECALLED
        if relations.statement_held_out(relation, row, template, lang)
    }
    assert len(held_out) > 50
    for index in range(1000):
        shown = document(1, index)
        if shown.kind == "facts":
            assert held_out.isdisjoint(re.split(r"\n|(?<=。)|(?<=\.) ", shown.text))


@pytest.mark.parametrize("held_out", [False, True])
def test_conversations_keep_to_their_side_of_the_split(held_out: bool) -> None:
    for task in TASKS:
        if held_out and task in ("small_talk", "telling"):
            continue  # these have no held-out side
        for index in range(20):
            talk = conversation(2, index, held_out, task, plain=True)
            rng = seeded("conversation", 2, index, held_out, task, None, None)
            rng.choice(LANGUAGES), rng.choice(EFFORTS)
            while (problem := draw_task(rng, task)).key != talk.key:
                rng.randrange(len(problem.questions[talk.lang]))
            phrasing = problem.questions[talk.lang].index(talk.user)
            assert conversation_held_out(problem, phrasing, talk.effort, talk.lang) == held_out


def test_thinking_grows_with_effort() -> None:
    for problem in problems(20):
        for lang in LANGUAGES:
            low, medium, high = (thinking(problem, lang, effort) for effort in EFFORTS)
            assert 0 < len(low) < len(high)
            assert len(medium) < len(high)
            assert "".join(problem.check[lang][-1]) in high


def test_conversations_have_histories_and_developers_now_and_then() -> None:
    talks = [conversation(5, index) for index in range(400)]
    assert {len(talk.history) for talk in talks} == {0, 1, 2}
    instructions = {instruction[lang] for instruction, _ in INSTRUCTIONS for lang in LANGUAGES}
    assert {talk.developer for talk in talks} == {None, *instructions}
    assert {talk.task for talk in talks} >= {"addition", "subtraction", "capital", "people"}
    assert {talk.task for talk in talks} <= {*TASKS, *FACT_TASKS}


def test_developer_instructions_shape_the_answer() -> None:
    problem = arithmetic.addition(27, 15)
    assert [shape(problem, "en") for _, shape in INSTRUCTIONS] == [
        "42",
        "Answer: The answer to 27 + 15 is 42.",
        "The answer to 27 + 15 is 42. That is all.",
    ]


def test_stories_have_as_many_sentences_in_both_languages() -> None:
    for index in range(50):
        told = stories.story(seeded("stories", index))
        assert told["ja"].count("。") == len(re.findall(r"\.(?= |$)", told["en"]))


def test_draw_returns_the_wanted_side() -> None:
    rng = seeded("sides")
    assert all(draw(arithmetic.draw_addition, rng, True).held_out for _ in range(20))
    assert not any(draw(reasoning.draw_sequence, rng, False).held_out for _ in range(20))
