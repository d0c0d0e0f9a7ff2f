"""The command line: thin wrappers over the package's functions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from workbench.errors import WorkbenchError

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
    from workbench.io.hub import model_name
    from workbench.io.prompts import BUNDLED_PROMPTS, load_prompts
    from workbench.io.weights import load_model
    from workbench.study import run_study, write_report
    from workbench.study.plan import choose_prompts, settings_for
    from workbench.study.report import check_seed

    check_seed(arguments.seed)
    prompts = choose_prompts(load_prompts(arguments.prompts or BUNDLED_PROMPTS), arguments.limit)
    dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "auto")
    model = load_model(arguments.model, dtype=dtype, device=arguments.device, moe_impl=arguments.moe_impl)
    settings = settings_for(
        model.chat_template,
        template=arguments.template,
        efforts=arguments.efforts,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
    )
    out = arguments.out or Path("runs") / model_name(arguments.model)
    print(write_report(run_study(model, prompts, out, settings), arguments.seed))


def report(arguments: argparse.Namespace) -> None:
    """Rebuild the page of a run."""
    from workbench.study import write_report

    print(write_report(arguments.run_dir, arguments.seed))


def params(arguments: argparse.Namespace) -> None:
    """Print a model's parameter table."""
    from workbench.family import family_member, params_table

    member = family_member(arguments.name)
    print(params_table(arguments.name, member.config))


def memory(arguments: argparse.Namespace) -> None:
    """Print what a generation needs; refuse what does not fit."""
    from workbench.memory import DTYPES, GIB, available_memory, config_of, predict

    needed = predict(
        config_of(arguments.model),
        arguments.context,
        dtype=DTYPES[arguments.dtype],
        batch=arguments.batch_size,
        chunk=arguments.prefill_chunk,
        record=arguments.record,
        records_on_disk=not arguments.in_memory,
    )
    print(needed.table(arguments.model))
    given = arguments.available
    needed.check(int(given * GIB) if given is not None else available_memory(arguments.device), arguments.device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="workbench", description="Interpretability workbench for LLM-jp-4.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_study(commands.add_parser("study", help="run prompts through a model, capture its routing, write a report"))
    rebuild = commands.add_parser("report", help="rebuild report.html of a finished run")
    rebuild.add_argument("run_dir", metavar="DIR", type=Path)
    _add_seed(rebuild)
    rebuild.set_defaults(run=report)
    table = commands.add_parser("params", help="print the parameter table of a released model")
    table.add_argument("name", metavar="NAME")
    table.set_defaults(run=params)
    _add_memory(commands.add_parser("memory", help="what a long generation needs: weights, cache, records"))
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
    add("--record", type=_names, default=(), metavar="LIST", help="routing and hook points, such as routing,resid_post")
    add("--in-memory", action="store_true", help="keep records in memory instead of files")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    add("--device", default="cpu", help="whose free memory counts: cpu, cuda ... (default: %(default)s)")
    add("--available", type=float, metavar="GIB", help="memory to plan for instead of what is free now")
    command.set_defaults(run=memory)


def _add_study(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help="name or directory (default: %(default)s)")
    add("--prompts", type=Path, metavar="FILE", help="JSONL, CSV or Parquet (default: the bundled prompts)")
    add("--out", type=Path, metavar="DIR", help="run directory (default: runs/MODEL); an unfinished run is continued")
    add("--efforts", type=_names, metavar="LIST", help="some of low,medium,high (default: all)")
    add("--max-new-tokens", type=int, metavar="N", help="longest answer (default: 192 in a chat, 0 for plain text)")
    add("--batch-size", type=int, default=32, metavar="N", help="conversations per pass (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="use only N prompt groups, spread over the file")
    add("--template", choices=("harmony", "plain"), help="default: harmony if the model has a chat template")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="default: float32 on CPU, else as stored")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: %(default)s)")
    add("--moe-impl", default="auto", help="how experts are computed (default: %(default)s)")
    _add_seed(command)
    command.set_defaults(run=study)


def _add_seed(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--seed", type=int, metavar="N", help="of the statistics' resampling (default: that of the last report, or 0)"
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
