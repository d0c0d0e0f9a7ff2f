"""The command line: thin wrappers over the package's functions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from workbench.arguments import add_runtime, interventions_of, model_of, names
from workbench.errors import WorkbenchError
from workbench.evals.commands import add_commands

DEFAULT_MODEL = "nano-moe-thinking"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a reported error, 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except WorkbenchError as error:
        print(f"workbench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("workbench: interrupted; the same command continues a study where it stopped", file=sys.stderr)
        return 130
    except OSError as error:  # a full disk, a missing permission
        print(f"workbench: {error}", file=sys.stderr)
        return 2
    return 0


def study(arguments: argparse.Namespace) -> None:
    """Load, run, capture, report."""
    from workbench.errors import RunError
    from workbench.io.hub import model_name
    from workbench.io.prompts import BUNDLED_PROMPTS, load_prompts
    from workbench.study import run_study, write_report
    from workbench.study.compare import check_comparable, compare_models
    from workbench.study.experts import measure_experts
    from workbench.study.plan import choose_prompts, settings_for
    from workbench.study.report import check_seed
    from workbench.study.swap import SwapPlan, run_swap

    check_seed(arguments.seed)
    prompts = choose_prompts(load_prompts(arguments.prompts or BUNDLED_PROMPTS), arguments.limit)
    model = model_of(arguments)
    settings = settings_for(
        model.chat_template,
        template=arguments.template,
        efforts=arguments.efforts,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        router_logits=arguments.router_logits,
        norms=arguments.norms,
        interventions=interventions_of(arguments.intervention),
    )
    if arguments.header_swap and settings.template != "harmony":
        raise RunError("--header-swap: expected conversations with headers, got plain text. Drop it, or study a chat.")
    other = model_of(arguments, arguments.compare) if arguments.compare else None
    if other is not None:
        check_comparable(model, other)  # before hours of measuring
    out = arguments.out or Path("runs") / model_name(arguments.model)
    run = run_study(model, prompts, out, settings)
    if arguments.seed is not None:
        run.seed = arguments.seed
    for header in arguments.header_swap:
        run_swap(model, run, SwapPlan(header, batch_size=arguments.batch_size))
    if arguments.experts:
        measure_experts(model, run)
    if other is not None:
        compare_models(model, other, run)
    print(write_report(run))


def report(arguments: argparse.Namespace) -> None:
    """Rebuild the page of a run."""
    from workbench.study import write_report

    print(write_report(arguments.run_dir, arguments.seed))


def calibrate(arguments: argparse.Namespace) -> None:
    """Score the pipeline on planted checkpoints of one shape."""
    from workbench.planted import calibrate as planted
    from workbench.plots.calibration import calibration_curves

    shape = (arguments.experts, arguments.k)
    if arguments.quick:
        scope = planted.quick(*shape)
    else:
        scope = planted.Scope(*shape, groups=tuple(arguments.groups), nulls=arguments.nulls, held=arguments.held)
    out = arguments.out or Path("runs") / f"calibration-{shape[0]}x{shape[1]}"
    floors = tuple(arguments.floors) if arguments.floors else None
    tables, floors = planted.calibrate(scope, out, floors=floors)
    figure = calibration_curves(tables["accuracy"])
    figure.write_html(out / "calibration.html", include_plotlyjs=True)
    print(planted.summary(scope, tables, floors))
    print(out / "calibration.html")


def params(arguments: argparse.Namespace) -> None:
    """Print a model's parameter table."""
    from workbench.family import params_table
    from workbench.memory import config_of

    print(params_table(arguments.name, config_of(arguments.name)))


def memory(arguments: argparse.Namespace) -> None:
    """Print what a generation needs; refuse what does not fit."""
    from workbench.hooks import as_device
    from workbench.memory import DTYPES, config_of, predict
    from workbench.models.room import GIB, available_memory

    needed = predict(
        config_of(arguments.model),
        arguments.context,
        dtype=DTYPES[arguments.dtype],
        experts=arguments.experts,
        batch=arguments.batch_size,
        chunk=arguments.prefill_chunk,
        record=arguments.record,
        records_on_disk=not arguments.in_memory,
    )
    given = arguments.available
    free = int(given * GIB) if given is not None else available_memory(str(as_device(arguments.device)))
    print(needed.table(arguments.model))
    needed.check(free, arguments.device)


def serve(arguments: argparse.Namespace) -> None:
    """Serve a model over HTTP until told to stop."""
    from workbench.chat import as_day
    from workbench.io.hub import model_name
    from workbench.models.room import available_memory
    from workbench.serve.command import api_key, limits_of, need_server
    from workbench.serve.run import check_address
    from workbench.serve.run import serve as run
    from workbench.serve.service import Identity, Service

    need_server()
    key = api_key(arguments.api_key, arguments.api_key_file)
    check_address(arguments.host, arguments.port, key)  # before minutes of loading
    as_day(arguments.date)
    limits = limits_of(arguments)
    items = interventions_of(arguments.intervention)
    model = model_of(arguments)
    identity = Identity(arguments.name or model_name(arguments.model), items, arguments.date, key)
    run(Service(model, identity, limits, available_memory(arguments.device)), arguments.host, arguments.port)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="workbench", description="Interpretability workbench for LLM-jp-4.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_study(commands.add_parser("study", help="run prompts through a model, capture its routing, write a report"))
    rebuild = commands.add_parser("report", help="rebuild report.html of a finished run")
    rebuild.add_argument("run_dir", metavar="DIR", type=Path)
    _add_seed(rebuild)
    rebuild.set_defaults(run=report)
    _add_calibrate(commands.add_parser("calibrate", help="score the statistics on models with planted experts"))
    table = commands.add_parser("params", help="print the parameter table of a model")
    table.add_argument("name", metavar="NAME")
    table.set_defaults(run=params)
    _add_memory(commands.add_parser("memory", help="what a long generation needs: weights, cache, records"))
    add_commands(commands)
    _add_serve(commands.add_parser("serve", help="an OpenAI-compatible server, with interventions and routing"))
    return parser


def _add_memory(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="MODEL", help="name or directory; of a released model nothing is downloaded")
    add("--context", type=int, required=True, metavar="N", help="positions, prompt and continuation together")
    add("--batch-size", type=int, default=1, metavar="N", help="rows (default: %(default)s)")
    add(
        "--prefill-chunk",
        type=int,
        default=512,
        metavar="N",
        help="columns of the prompt a pass (default: %(default)s)",
    )
    add("--record", type=names, default=(), metavar="LIST", help="routing and hook points, such as routing,resid_post")
    add("--in-memory", action="store_true", help="keep records in memory instead of files")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    add("--experts", choices=("plain", "int8", "int4"), default="plain", help="how experts are held (default: plain)")
    add("--device", default="cpu", help="whose free memory counts: cpu, cuda ... (default: %(default)s)")
    add("--available", type=float, metavar="GIB", help="memory to plan for instead of what is free now")
    command.set_defaults(run=memory)


def _add_serve(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help="name or directory (default: %(default)s)")
    add("--intervention", type=Path, metavar="FILE", help="JSON of interventions that act on every request")
    add("--name", metavar="NAME", help="what clients call the model (default: its own name)")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="others than loopback need a key (default: %(default)s)")
    add("--port", type=int, default=8000, metavar="N", help="0 for any free one (default: %(default)s)")
    add("--api-key", metavar="KEY", help="better --api-key-file or WORKBENCH_API_KEY: a command line is seen by others")
    add("--api-key-file", type=Path, metavar="FILE", help="a file that holds the key")
    add("--date", metavar="YYYY-MM-DD", help="of every chat that names none (default: today)")
    add("--rows", type=int, metavar="N", help="sequences in one decoding pass (default: 8)")
    add("--running", type=int, metavar="N", help="sequences that run at once (default: 32)")
    add("--queue", type=int, metavar="N", help="sequences that may wait (default: 256)")
    add("--choices", type=int, metavar="N", help="sequences of one request (default: 128)")
    add("--prefill-chunk", type=int, metavar="N", help="columns of a prompt in one pass (default: 256)")
    add("--cache-positions", type=int, metavar="N", help="of all that run (default: what half the free memory holds)")
    add("--body-bytes", type=int, metavar="N", help="largest request (default: 4 MiB)")
    add("--connections", type=int, metavar="N", help="open at once, idle ones too (default: 1024)")
    add("--seconds", type=float, metavar="S", help="longest request, waiting included (default: 600)")
    add("--stall-seconds", type=float, metavar="S", help="longest that a client may send or take nothing (default: 60)")
    add("--buffer", type=int, metavar="N", help="tokens kept for a slow reader (default: 64)")
    add("--drain-seconds", type=float, metavar="S", help="for what runs when the server is stopped (default: 60)")
    add_runtime(command)
    command.set_defaults(run=serve)


def _add_study(command: argparse.ArgumentParser) -> None:
    add, toggle = command.add_argument, argparse.BooleanOptionalAction
    add("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help="name or directory (default: %(default)s)")
    add("--prompts", type=Path, metavar="FILE", help="JSONL, CSV or Parquet (default: the bundled prompts)")
    add("--out", type=Path, metavar="DIR", help="run directory (default: runs/MODEL); an unfinished run is continued")
    add("--efforts", type=names, metavar="LIST", help="some of low,medium,high (default: all)")
    add("--max-new-tokens", type=int, metavar="N", help="longest answer (default: 192 in a chat, 0 for plain text)")
    add("--batch-size", type=int, default=32, metavar="N", help="conversations per pass (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="use only N prompt groups, spread over the file")
    add("--intervention", type=Path, metavar="FILE", help="JSON of interventions to run under (docs/interventions.md)")
    add("--template", choices=("harmony", "plain"), help="default: harmony if the model has a chat template")
    add_runtime(command)
    add("--router-logits", action=toggle, default=True, help="keep the router logits of all experts (default: yes)")
    add(
        "--experts",
        action=toggle,
        default=True,
        help="also remove and force experts, see what they write (default: yes)",
    )
    add("--header-swap", nargs="*", default=(), choices=("effort", "channel"), help="read again with another header")
    add("--compare", metavar="MODEL", help="another checkpoint of the same lineage, on the same tokens")
    add("--norms", action="store_true", help="also measure how much each chosen expert adds")
    _add_seed(command)
    command.set_defaults(run=study)


def _add_calibrate(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--experts", type=int, default=32, metavar="E", help="experts per layer (default: %(default)s)")
    add("--k", type=int, default=4, metavar="K", help="experts per token (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="default: runs/calibration-ExK; an unfinished calibration is continued")
    add("--groups", type=int, nargs="+", default=(10, 20, 40), metavar="N", help="document pairs (default: 10 20 40)")
    add("--nulls", type=int, default=400, metavar="N", help="trials without any effect (default: %(default)s)")
    add("--held", type=int, default=60, metavar="N", help="trials per coverage of intervals (default: %(default)s)")
    add("--floors", type=float, nargs=2, metavar=("RISK", "LOGIT"), help="judge these floors (default: choose them)")
    add("--quick", action="store_true", help="a minute instead of many, with wide intervals")
    command.set_defaults(run=calibrate)


def _add_seed(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--seed", type=int, metavar="N", help="of the statistics' resampling (default: that of the last report, or 0)"
    )
