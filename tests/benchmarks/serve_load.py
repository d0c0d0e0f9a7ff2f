"""Hundreds of clients at once, of every temper, against a server of its own process.

Some take a whole answer, some a stream, some read slowly, some hang up in the middle; some ask for interventions. Every
answer that was read to its end is compared with the same request served alone, and what a client read before it hung up
has to be its beginning. Between waves the server's memory is read.

    python tests/benchmarks/serve_load.py --model nano-moe-thinking --clients 300 --waves 4

Exit code 1 when an answer was lost or mixed, something is left running, or memory grew by more than the bound.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

TEMPERS = ("whole", "stream", "slow", "leaves")
RETRY_SECONDS = 0.2
TEXTS = ("2足す3はいくつですか。", "The capital of France is", "猫について一言。", "Why is the sea blue?", "1, 2, 3,")


@dataclass
class Tally:
    """What happened: `outcomes` by kind, `wrong` in words, `refused` counts answers of 429."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    refused: int = 0
    seconds: list[float] = field(default_factory=list)


def draw_requests(draw: random.Random, n: int, max_tokens: int, has_experts: bool) -> list[dict[str, Any]]:
    """Different requests, each repeatable: greedy or seeded."""
    found = []
    for number in range(n):
        body: dict[str, Any] = {
            "prompt": draw.choice(TEXTS) * draw.randint(1, 4),
            "max_tokens": draw.randint(1, max_tokens),
            "temperature": draw.choice([0, 0.8, 1.2]),
            "seed": number,
            "logit_bias": {"2": -100.0, "13": -100.0},  # write on
        }
        if draw.random() < 0.4:
            where = {"phase": draw.choice(["prefill", "decode"])}
            change: dict[str, Any] = {"kind": "scale_activation", "point": "mlp_out", "factor": 0.5, "where": where}
            if has_experts and draw.random() < 0.7:
                experts = draw.sample(range(8), 2)
                change = {"kind": "knock_out", "experts": experts, "mode": draw.choice(["reroute", "drop"])}
            body["intervention"] = {"format": 1, "interventions": [change]}
        if has_experts and draw.random() < 0.2:
            body["routing"] = True
        found.append(body)
    return found


async def ask(client: httpx.AsyncClient, body: dict[str, Any], temper: str, draw: random.Random, tally: Tally) -> Any:
    """(text, routing) of an answer, or its beginning (text, None) for a client that leaves; tries again after a 429."""
    while True:
        try:
            if temper == "whole":
                answer = await client.post("/v1/completions", json=body)
                if answer.status_code == 200:
                    choice = answer.json()["choices"][0]
                    return choice["text"], choice.get("routing")
                status, text = answer.status_code, answer.text
            else:
                async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                    if answer.status_code == 200:
                        return await _read(answer, temper, draw)
                    status, text = answer.status_code, (await answer.aread()).decode()
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}"
        if status != 429:
            return f"status {status}: {text[:200]}"
        tally.refused += 1
        await asyncio.sleep(RETRY_SECONDS)


async def _read(answer: httpx.Response, temper: str, draw: random.Random) -> tuple[str, Any] | str:
    text, routing, patience = "", None, draw.randint(0, 4)
    async for line in answer.aiter_lines():
        if not line:
            continue
        document = line.removeprefix("data: ")
        if document == "[DONE]":
            return text, routing
        event = json.loads(document)
        if "error" in event:
            return str(event["error"])
        choice = event["choices"][0]
        text, routing = text + choice["text"], choice.get("routing", routing)
        if temper == "slow":
            await asyncio.sleep(draw.random() * 0.05)
        patience -= 1
        if temper == "leaves" and patience < 0:
            return text, None
    return "the stream ended without [DONE]"


async def wave(url: str, model: str, bodies: list[dict[str, Any]], want: list[Any], n: int, seed: int) -> Tally:
    """`n` clients at once; each takes a request at random and compares what it gets with `want`."""
    draw, tally = random.Random(seed), Tally()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=3600, limits=limits) as client:

        async def one(number: int, temper: str, own: random.Random) -> None:
            began = time.perf_counter()
            got = await ask(client, {"model": model, **bodies[number]}, temper, own, tally)
            tally.seconds.append(time.perf_counter() - began)
            right = got == want[number]
            if temper == "leaves" and isinstance(got, tuple) and got[1] is None:
                right = want[number][0].startswith(got[0])
            tally.outcomes[f"{temper}: {'right' if right else 'wrong'}"] += 1
            if not right:
                tally.wrong.append(f"request {number}, {temper}: got {str(got)[:300]}, not {str(want[number])[:300]}")

        clients = [
            one(draw.randrange(len(bodies)), TEMPERS[place % len(TEMPERS)], random.Random(draw.random()))
            for place in range(n)
        ]
        await asyncio.gather(*clients)
    return tally


async def alone(url: str, model: str, bodies: list[dict[str, Any]]) -> list[Any]:
    """Each answer while nothing else runs."""
    async with httpx.AsyncClient(base_url=url, timeout=3600) as client:
        return [await ask(client, {"model": model, **body}, "whole", random.Random(0), Tally()) for body in bodies]


def wait_until_idle(url: str, seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = httpx.get(f"{url}/health", timeout=60).json()
        if state["running"] == state["waiting"] == 0:
            return True
        time.sleep(0.1)
    return False


@contextmanager
def server(model: str, *arguments: str) -> Iterator[tuple[str, psutil.Process]]:
    """`workbench serve` on a free port; its URL and process."""
    command = [sys.executable, "-m", "workbench", "serve", model, "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "http" not in line:
            raise SystemExit("the server did not start")
        yield line.split()[-1].removesuffix("/v1"), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(120)


def main() -> int:
    arguments = _arguments()
    draw = random.Random(arguments.seed)
    with server(arguments.model, "--rows", str(arguments.rows)) as (url, process):
        name = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
        bodies = draw_requests(draw, arguments.requests, arguments.max_tokens, "moe" in arguments.model)
        want = asyncio.run(alone(url, name, bodies))
        failed = [answer for answer in want if isinstance(answer, str)]
        if failed:
            print(f"alone: {failed[0]}")
            return 1
        sizes, wrong, idle = [], [], True
        for number in range(arguments.waves):
            began = time.perf_counter()
            tally = asyncio.run(wave(url, name, bodies, want, arguments.clients, arguments.seed + number))
            idle = wait_until_idle(url) and idle
            sizes.append(process.memory_info().rss / (1 << 20))
            wrong += tally.wrong
            outcomes = ", ".join(f"{kind} {count}" for kind, count in sorted(tally.outcomes.items()))
            seconds = time.perf_counter() - began
            print(f"wave {number}: {outcomes}; 429s {tally.refused}; {seconds:.1f} s; {sizes[-1]:.0f} MiB", flush=True)
    growth = sizes[-1] - sizes[min(1, len(sizes) - 1)]  # the first wave fills caches and pools
    print(*wrong[:5], sep="\n")
    print(f"wrong {len(wrong)}; memory grew by {growth:.1f} MiB since wave 1; idle in the end: {idle}")
    return int(bool(wrong) or not idle or growth > arguments.growth)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano-moe-thinking")
    parser.add_argument("--clients", type=int, default=300, help="at once in each wave (default: %(default)s)")
    parser.add_argument("--waves", type=int, default=4)
    parser.add_argument("--requests", type=int, default=24, help="different ones (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--growth", type=float, default=32.0, help="MiB that memory may grow (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
