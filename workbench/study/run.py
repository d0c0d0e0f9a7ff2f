"""Run a study: batch after batch through the model into a run directory, resumable."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from workbench.axes import SEGMENTS, TOKEN_COLUMNS
from workbench.capture import capture_routing, check_room, routed_layers, suitable_threads, write_answers
from workbench.chat import label_tokens
from workbench.errors import ShapeError
from workbench.interventions import Interventions
from workbench.io.prompts import LANGS, Prompt
from workbench.io.run_files import Labels
from workbench.io.runs import Run, RunWriter
from workbench.io.token_class import places, token_classes, word_starts
from workbench.io.tokens import Tokenizer
from workbench.models import Llama
from workbench.study.describe import describe_model, describe_prompts, describe_sitting, tokenizer_of
from workbench.study.plan import Document, Settings, plan_documents
from workbench.study.progress import Stopwatch, show_progress

Ran = dict[str, list[dict[str, object]]]  # by part of a batch: how each intervention ran, as in `intervention_table`


def run_study(
    model: Llama,
    prompts: Sequence[Prompt],
    out: str | Path,
    settings: Settings | None = None,
    progress: bool = True,
) -> Run:
    """Answer every prompt at every effort, capture the routing of each whole conversation, write a run directory.

    A directory that holds a part of the same study is continued, a finished one is opened as it is; the result is the
    same as that of one uninterrupted run. Raises RunError naming the first setting that differs from the run that is
    there, ConfigError for a model without experts, InterventionError for interventions that do not fit the model,
    ShapeError for a prompt that does not fit the context. progress: say on stderr how far it is.
    """
    settings = settings or Settings()
    routed_layers(model)
    Interventions(settings.interventions).check(model)
    tokenizer = tokenizer_of(model)
    documents = plan_documents(prompts, tokenizer, settings, model.chat_template)
    _check_lengths(model, documents, settings.max_new_tokens)
    batches = [
        documents[start : start + settings.batch_size] for start in range(0, len(documents), settings.batch_size)
    ]
    identity = {
        "settings": settings.manifest(),  # first: a difference here is named, not the hashes that follow from it
        "model": describe_model(model, tokenizer),
        "prompts": describe_prompts(prompts, documents),
    }
    watch, ran = Stopwatch(), Ran()
    with suitable_threads(model), RunWriter.open(out, identity, describe_sitting(model), len(batches)) as writer:
        for part in show_progress(writer.missing(), len(batches), progress):
            writer.write(part, *measure(model, tokenizer, batches[part], settings, watch, ran))
        return writer.finish({**watch.report(), **({"interventions": ran} if ran else {})})


def _check_lengths(model: Llama, documents: Sequence[Document], max_new_tokens: int) -> None:
    """Raises ShapeError naming the document that does not fit the context, before anything runs."""
    for document in documents:
        try:
            check_room(model, [document.ids], max_new_tokens)
        except ShapeError as error:
            effort = f" at {document.effort} effort" if document.effort else ""
            raise ShapeError(f"prompt {document.doc_id}{effort}: {error}") from None


def measure(
    model: Llama, tokenizer: Tokenizer, batch: Sequence[Document], settings: Settings, watch: Stopwatch, ran: Ran
) -> tuple[pl.DataFrame, pl.DataFrame, np.ndarray, Labels, np.ndarray | None]:
    """One batch: (tokens, routing, expert load [lang segment layer expert], its labels, router logits if asked for)."""
    interventions = Interventions(
        settings.interventions,
        label=partial(label_tokens, tokenizer=tokenizer),
        langs=[document.lang for document in batch],
        n_prompt=[len(document.ids) for document in batch],
    )
    with watch("generation"), model.intervene(interventions):
        answers = write_answers(model, [document.ids for document in batch], settings.max_new_tokens)
        _note(ran, "generation", model)
    with watch("capture"), model.intervene(interventions):
        sequences = [[*doc.ids, *answer] for doc, answer in zip(batch, answers, strict=True)]
        routing = capture_routing(model, sequences, settings.router_logits, settings.norms)
        _note(ran, "capture", model)
    with watch("frames"):
        tokens = pl.concat([token_frame(doc, answer, tokenizer) for doc, answer in zip(batch, answers, strict=True)])
        labels: Labels = {"lang": list(LANGS), "segment": list(SEGMENTS), "layer": list(routing.layers)}
        cells = [
            (LANGS.index(lang), SEGMENTS.index(segment)) for lang, segment in tokens.select("lang", "segment").rows()
        ]
        load = routing.load(cells, (len(LANGS), len(SEGMENTS)))
        frame = routing.frame(tokens["doc_id"].to_list(), tokens["pos"].to_list())
        return tokens, frame, load, labels, routing.router_logits


def _note(ran: Ran, part: str, model: Llama) -> None:
    if table := model.intervention_table():
        ran[part] = [row._asdict() for row in table]


def token_frame(document: Document, answer: Sequence[int], tokenizer: Tokenizer) -> pl.DataFrame:
    """One row per token of a conversation, with axes.TOKEN_COLUMNS; `answer` are the ids that the model wrote."""
    ids = [*document.ids, *answer]
    tokens = pl.DataFrame(
        {
            "doc_id": document.doc_id,
            "group_id": document.group_id,
            "split": document.split,
            "topic": document.topic,
            "lang": document.lang,
            "script": document.script,
            "pos": range(len(ids)),
            "token_id": ids,
            "token": tokenizer.to_str_tokens(ids),
            "token_class": token_classes(ids, tokenizer),
            "word_initial": word_starts(ids, tokenizer),
            "segment": label_tokens(ids, tokenizer),
            "phase": ["prefill"] * len(document.ids) + ["decode"] * len(answer),
        }
    ).with_columns(effort=pl.lit(document.effort, dtype=pl.String))
    return tokens.hstack(places(tokens["segment"])).select(TOKEN_COLUMNS)
