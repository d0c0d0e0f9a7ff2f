"""The commands eval, ablate and judge-export: their arguments, and thin wrappers over the package's functions."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from workbench.arguments import add_runtime, interventions_of, model_of, names
from workbench.errors import RunError

MODES = ("reroute", "drop", "drop_renormalise")


def add_commands(commands: Any) -> None:
    """Add the three to the command line's subparsers."""
    _add_eval(commands.add_parser("eval", help="run tasks of lm-evaluation-harness, under interventions if wanted"))
    _add_ablate(commands.add_parser("ablate", help="what taking experts out costs each language, beside controls"))
    _add_judge(commands.add_parser("judge-export", help="answer the benchmarks of llm-jp-judge and write its files"))


def evaluate(arguments: argparse.Namespace) -> None:
    """Run tasks; print the table, and write it and every item to the directory."""
    harness = _harness()
    lm = _language_model(arguments)
    found = harness.evaluate(
        lm,
        arguments.tasks,
        limit=arguments.limit,
        num_fewshot=arguments.num_fewshot,
        chat=arguments.chat,
        system=arguments.system,
        gen_kwargs=arguments.gen_kwargs,
        include_path=arguments.include_path,
        bootstrap_iters=arguments.bootstrap,
    )
    print(harness.markdown(found, lm))
    if arguments.out:
        print(harness.write(found, lm, arguments.out))


def ablate(arguments: argparse.Namespace) -> None:
    """Evaluate under changes and controls; write tables and a report."""
    _harness()
    from workbench.evals.ablate import AblatePlan, ablate_by_scan
    from workbench.evals.ablate import ablate as run
    from workbench.evals.report import summary, write_report
    from workbench.io.hub import model_name

    lm = _language_model(arguments)
    plan = AblatePlan(
        arguments.tasks,
        n_controls=arguments.controls,
        metric=arguments.metric,
        limit=arguments.limit,
        num_fewshot=arguments.num_fewshot,
        chat=arguments.chat,
        seed=arguments.seed,
        include_path=arguments.include_path,
    )
    out = arguments.out or Path("runs") / f"ablate-{model_name(arguments.model)}"
    if arguments.experts == "scan":
        if len(arguments.modes) != 1:
            raise RunError(f"modes: expected one with --experts scan, got {', '.join(arguments.modes)}.")
        found = ablate_by_scan(lm, plan, out, arguments.top, arguments.modes[0], arguments.layers)
    else:
        found = run(lm, _targets(lm.model, arguments), plan, out)
    print(summary(found))
    print(write_report(found))


def judge_export(arguments: argparse.Namespace) -> None:
    """Answer benchmarks; print the files written."""
    from workbench.evals.judge import Asking, export

    model = model_of(arguments)
    asking = Asking(
        effort=None if arguments.effort == "none" else arguments.effort,
        date=arguments.date,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
    )
    benchmarks = dict(_benchmark(text) for text in arguments.benchmark)
    changes = interventions_of(arguments.intervention)
    for path in export(model, benchmarks, arguments.out, asking, name=arguments.name, limit=arguments.limit,
                       interventions=changes, overwrite=arguments.overwrite):  # fmt: skip
        print(path)


def _targets(model: Any, arguments: argparse.Namespace) -> list[Any]:
    """What the arguments ask to take out: sets of experts, each expert alone, or a file of interventions."""
    from workbench.evals.targets import Target, describe_places, knock_out, parse_places, study_places, target_of

    named: dict[str, Any] = {}
    if arguments.experts:
        places = parse_places(arguments.experts)
        named = {describe_places([p]): (p,) for p in places} if arguments.each else {"experts": places}
    if arguments.study:
        table, by_lang = study_places(arguments.study, arguments.top)
        named |= {f"{lang} {arguments.top} by {table}": places for lang, places in by_lang.items()}
    targets = [
        Target(f"{mode} {name}", knock_out(places, mode), places)
        for mode in arguments.modes
        for name, places in named.items()
    ]
    if arguments.intervention:
        targets.append(target_of(arguments.intervention.stem, interventions_of(arguments.intervention), model))
    if not targets:
        raise RunError("ablate: expected --experts, --run or --intervention, got none of them.")
    return targets


def _harness() -> Any:
    try:
        from workbench.evals import harness
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "workbench":
            raise
        raise RunError(f"eval: expected lm_eval, got no package {error.name}. Install the extra `eval`.") from None
    return harness


def _language_model(arguments: argparse.Namespace) -> Any:
    from workbench.evals.adapter import WorkbenchLM

    return WorkbenchLM(
        model_of(arguments),
        interventions_of(getattr(arguments, "intervention", None) if arguments.run is evaluate else None),
        batch_size=arguments.batch_size,
        effort=None if arguments.effort == "none" else arguments.effort,
        date=arguments.date,
        add_bos=None if arguments.bos == "auto" else arguments.bos == "always",
        answers=arguments.answers,
        seed=arguments.seed,
    )


def _benchmark(text: str) -> tuple[str, str]:
    name, found, path = text.partition("=")
    if not found:
        raise RunError(f"benchmark: expected NAME=FILE, such as mt_bench_ja=question.jsonl, got {text!r}.")
    return name, path


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def _modes(text: str) -> tuple[str, ...]:
    unknown = [name for name in names(text) if name not in MODES]
    if unknown or not names(text):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(MODES)}, got {text!r}")
    return names(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(name) for name in names(text))


def _add_model(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="MODEL", help="name or directory")
    add("--effort", choices=("low", "medium", "high", "none"), default="medium", help="of conversations (%(default)s)")
    add("--batch-size", type=int, default=32, metavar="N", help="sequences per pass (default: %(default)s)")
    add_runtime(command)
    add("--limit", type=int, metavar="N", help="the first N items of each task")


def _add_tasks(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--tasks", type=names, required=True, metavar="LIST", help="tasks, groups or tags; ours are workbench_...")
    add("--chat", action="store_true", help="render every item as a conversation")
    add("--num-fewshot", type=int, metavar="N", help="examples before each item")
    add("--date", default="2026-01-01", help="of conversations, YYYY-MM-DD (default: %(default)s)")
    add(
        "--bos",
        choices=("auto", "always", "never"),
        default="auto",
        help="<|startoftext|> first (auto: in plain text)",
    )
    add("--answers", choices=("auto", "final", "all"), default="auto", help="what is judged of what is written")
    add("--include-path", metavar="DIR", help="a folder of further task files")


def _add_eval(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    _add_tasks(command)
    add = command.add_argument
    add("--intervention", type=Path, metavar="FILE", help="JSON of interventions to run under (docs/interventions.md)")
    add("--system", metavar="TEXT", help="system message of conversations")
    add("--gen-kwargs", type=_json_object, metavar="JSON", help='over the task\'s own, such as {"max_gen_toks": 64}')
    add("--bootstrap", type=int, default=1000, metavar="N", help="resamples for standard errors (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of sampling (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="write results.json, means.csv and items.parquet there")
    command.set_defaults(run=evaluate)


def _add_ablate(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    _add_tasks(command)
    add = command.add_argument
    add("--experts", metavar="LIST", help='layer:expert,... or a file of them; or "scan": every expert, then the top N')
    add("--run", dest="study", type=Path, metavar="DIR", help="a study: the top N experts of each language by contrast")
    add("--top", type=int, default=8, metavar="N", help="experts per language of --run and scan (default: %(default)s)")
    add("--each", action="store_true", help="judge every expert of --experts alone, not the set")
    add("--layers", type=_numbers, metavar="LIST", help="of scan (default: all that have experts)")
    add(
        "--modes",
        type=_modes,
        default=("reroute",),
        metavar="LIST",
        help="of knock-outs (default: reroute)",
    )
    add("--intervention", type=Path, metavar="FILE", help="JSON of interventions to judge as one change")
    add("--controls", type=int, default=39, metavar="N", help="random changes per target (default: %(default)s)")
    add("--metric", metavar="NAME", help="to judge by (default: logprob where tasks have it)")
    add("--seed", type=int, default=0, metavar="N", help="of controls and resampling (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="default: runs/ablate-MODEL; an unfinished run is continued")
    command.set_defaults(run=ablate)


def _add_judge(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    add = command.add_argument
    add(
        "--benchmark",
        action="append",
        required=True,
        metavar="NAME=FILE",
        help="repeat for several",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="for BENCHMARK.jsonl and metadata.json")
    add("--max-tokens", type=int, default=4096, metavar="N", help="per turn, thinking included (default: %(default)s)")
    add("--temperature", type=float, metavar="T", help="default: what the judge asks for, by category")
    add("--seed", type=int, metavar="N", help="default: what the judge asks for")
    add("--date", help="of conversations, YYYY-MM-DD (default: today)")
    add("--name", metavar="TEXT", help="in metadata.json (default: the checkpoint's)")
    add("--intervention", type=Path, metavar="FILE", help="JSON of interventions to answer under")
    add("--overwrite", action="store_true", help="write files again that are there")
    command.set_defaults(run=judge_export)
