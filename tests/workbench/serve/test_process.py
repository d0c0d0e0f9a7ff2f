"""The server as a process: `workbench serve`, load from many clients, and what a signal does."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from serve_running import LIMITS, running

from workbench.cli import main
from workbench.interventions import KnockOut, save_interventions
from workbench.io.saving import save_model
from workbench.models import Llama
from workbench.serve.app import create_app
from workbench.serve.service import Identity, Service

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "serve_load.py"
BODY = {"model": "tiny", "prompt": [40, 41, 42], "max_tokens": 60, "temperature": 0, "logit_bias": {"2": -100.0}}


@pytest.fixture(scope="module")
def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_load", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_load"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def process(tiny_moe: Llama, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The tiny model behind the command line, knocked out for every request; its URL and process."""
    folder = tmp_path_factory.mktemp("served")
    save_model(tiny_moe, folder / "tiny")
    file = save_interventions([KnockOut(experts=(0,), mode="reroute")], folder / "gone.json")
    command = [sys.executable, "-m", "workbench", "serve", str(folder / "tiny"), "--port", "0", "--name", "tiny"]
    command += ["--intervention", str(file), "--rows", "4", "--running", "6"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as found:
        assert found.stdout is not None
        line = found.stdout.readline()
        assert "http" in line, line
        yield line.split()[-1].removesuffix("/v1"), found
        if found.poll() is None:
            found.kill()


@pytest.mark.slow
def test_forty_clients_get_the_answers_of_being_alone(tiny_moe: Llama, load: ModuleType) -> None:
    with running(tiny_moe) as server:
        bodies = load.draw_requests(random.Random(3), 10, 12, has_experts=True)
        want = asyncio.run(load.alone(server.url, "tiny", bodies))
        assert not [answer for answer in want if isinstance(answer, str)]
        tally = asyncio.run(load.wave(server.url, "tiny", bodies, want, 40, seed=1))
        server.wait_until_idle()
        assert tally.wrong == []
        assert tally.refused > 0  # more than the queue holds came at once, and tried again
        assert sum(tally.outcomes.values()) == 40
        assert server.service.engine.pool.n_used == 0
        assert server.service.engine.pool.n_allocated <= LIMITS.cache_positions


@pytest.mark.slow
def test_a_signal_finishes_what_runs_and_refuses_new_work(process: tuple[str, subprocess.Popen[str]]) -> None:
    url, found = process
    whole = httpx.post(f"{url}/v1/completions", json={**BODY, "routing": True}, timeout=300).json()["choices"][0]
    with httpx.stream("POST", f"{url}/v1/completions", json={**BODY, "stream": True}, timeout=300) as answer:
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
        text = json.loads(next(lines))["choices"][0]["text"]
        found.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert rest.pop() == "[DONE]"
    assert text + "".join(json.loads(line)["choices"][0]["text"] for line in rest) == whole["text"]
    assert found.wait(120) == 0
    host, port = url.removeprefix("http://").split(":")
    with pytest.raises(OSError, match=r"refused|reset"), socket.create_connection((host, int(port)), timeout=5):
        pass


def test_the_command_refuses_what_cannot_be_served(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve", "nano-moe-thinking", "--host", "0.0.0.0"]) == 2
    assert "without an API key" in capsys.readouterr().err
    assert main(["serve", "nano-moe-thinking", "--rows", "0"]) == 2
    assert "rows: expected a whole number" in capsys.readouterr().err


def test_a_reader_that_takes_nothing_holds_little_and_is_let_go(tiny_moe: Llama) -> None:
    limits = replace(LIMITS, buffer=5, stall_seconds=1.0)
    service = Service(tiny_moe, Identity("tiny"), limits, 1 << 30)
    app = create_app(service)
    service.scheduler.start()
    blocked: list[str] = []

    async def stuck() -> None:
        body = json.dumps({**BODY, "max_tokens": 250, "stream": True}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict:
            return messages.pop() if messages else await asyncio.Event().wait()  # type: ignore[return-value]

        async def send(message: dict) -> None:
            blocked.append(message["type"])
            if len(blocked) > 3:
                await asyncio.Event().wait()

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"}
        scope |= {"method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b""}
        scope |= {"headers": headers, "scheme": "http", "root_path": "", "client": ("x", 1), "server": ("y", 2)}
        await app(scope, receive, send)

    asyncio.run(asyncio.wait_for(stuck(), 120))
    assert len(blocked) == 4  # what came after was never handed over
    service.scheduler.stop(60)
    text = service.metrics.text().decode()
    assert 'choices_total{reason="cancelled"} 1.0' in text
    (written,) = [line for line in text.splitlines() if line.startswith('workbench_tokens_total{phase="decode"}')]
    assert float(written.split()[-1]) < 40  # of 250: it sat out while its reader held still


def test_importing_the_engine_needs_no_web_framework() -> None:
    script = "import sys, workbench.serve; assert not {'fastapi', 'uvicorn', 'starlette'} & set(sys.modules)"
    path = [str(SCRIPT.parents[2]), str(SCRIPT.parents[2] / "kernels")]
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": ":".join(path), "PATH": ""})
