"""What a server refuses, lets go of, and survives: keys, sizes, queues, times, clients that leave or fall behind."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import replace

import httpx
import pytest
from serve_running import LIMITS, Running, running

from workbench.cli import main
from workbench.errors import ConfigError
from workbench.models import Llama
from workbench.serve import Limits
from workbench.serve.choice import Written
from workbench.serve.command import api_key
from workbench.serve.engine import CachePool, Engine
from workbench.serve.limits import cache_positions
from workbench.serve.mailbox import Mailbox
from workbench.serve.run import check_address
from workbench.serve.service import Identity

KEY = "0123456789abcdef"
TEXT = "/v1/completions"
IDS = list(range(40, 60))
LONG = {"prompt": IDS, "max_tokens": 290, "temperature": 1, "logit_bias": {"2": -100.0, "13": -100.0}}


def test_other_addresses_need_a_key() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        check_address(host, 8000, None)
    for host in ("0.0.0.0", "192.0.2.1"):
        with pytest.raises(ConfigError, match="without an API key"):
            check_address(host, 8000, None)
        check_address(host, 8000, KEY)
    for key in ("", "short", "x" * 15 + " ", "\t" * 16, KEY + "\n"):
        with pytest.raises(ConfigError, match="api key"):
            check_address("127.0.0.1", 8000, key)


def test_a_key_of_the_environment_may_end_in_a_line_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_API_KEY", KEY + "\n")
    assert api_key(None, None) == KEY
    monkeypatch.setenv("WORKBENCH_API_KEY", " ")
    assert api_key(None, None) is None


def test_ports_and_dates_are_checked_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="port: expected a number from 0 to 65535, got 99999"):
        check_address("127.0.0.1", 99_999, None)
    with pytest.raises(ConfigError, match="host: expected an address"):
        check_address("no such host", 8000, KEY)
    assert main(["serve", "no such model", "--date", "yesterday"]) == 2
    assert "date: expected YYYY-MM-DD, got 'yesterday'" in capsys.readouterr().err


def test_a_body_that_does_not_come_is_given_up(tiny_moe: Llama) -> None:
    with running(tiny_moe, replace(LIMITS, stall_seconds=0.3)) as server:
        address = httpx.URL(server.url)
        with socket.create_connection((address.host, address.port), timeout=20) as client:
            head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
            client.sendall(head.encode() + b"{")
            said = client.recv(4096)
            assert said.startswith(b"HTTP/1.1 408")
            assert b"connection: close" in said.lower()
        assert server.post(TEXT, {"prompt": IDS, "max_tokens": 1}).status_code == 200


def test_limits_are_checked() -> None:
    for wrong in ({"rows": 0}, {"queue": 1.5}, {"seconds": float("nan")}, {"running": True}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Limits(**wrong)


def test_caches_take_half_of_what_is_free(tiny_llama: Llama) -> None:
    per_position = 2 * 2 * 2 * 8 * 4  # keys and values, layers, kv heads, d_head, bytes
    assert cache_positions(Limits(), tiny_llama.cfg, 4, 2 * 1000 * per_position) == 1000
    with pytest.raises(ConfigError, match="cache_positions"):
        cache_positions(Limits(), tiny_llama.cfg, 4, 100)


def test_what_can_be_asked_for_fits_the_caches(tiny_llama: Llama) -> None:
    engine = Engine(tiny_llama, replace(LIMITS, cache_positions=300), 1 << 30)
    assert engine.n_ctx == 256  # of 300 positions a cache takes whole pages
    assert engine.pool.take(engine.n_ctx) is not None
    with pytest.raises(ConfigError, match="cache_positions"):
        Engine(tiny_llama, replace(LIMITS, cache_positions=100), 1 << 30)


def test_caches_are_recycled_within_their_bound(tiny_llama: Llama) -> None:
    pool = CachePool(tiny_llama, 512)
    first, second = pool.take(100), pool.take(200)
    assert first is not None
    assert second is not None
    assert (first.n_ctx, second.n_ctx) == (128, 256)
    assert pool.take(200) is None  # 384 of 512 are in use
    pool.give_back(first)
    assert pool.take(60) is first  # not a new one
    pool.give_back(first)
    pool.give_back(second)
    big = pool.take(500)
    assert big is not None
    assert pool.n_allocated == 512


def test_the_key_is_asked_for_everywhere_but_at_health(tiny_moe: Llama) -> None:
    with running(tiny_moe, identity=Identity("tiny", api_key=KEY)) as server, server.client() as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
            answer = client.get("/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["type"] == "authentication_error"
        assert client.get("/metrics").status_code == 401
        assert client.get("/health").json()["status"] == "ok"
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_bodies_are_limited_however_they_are_sent(tiny_moe: Llama) -> None:
    with running(tiny_moe, replace(LIMITS, body_bytes=2000)) as server, server.client() as client:
        body = json.dumps({"model": "tiny", "prompt": "x" * 4000}).encode()
        headers = {"content-type": "application/json"}
        whole = client.post(TEXT, content=body, headers=headers)
        chunks = client.post(TEXT, content=iter([body[:1500], body[1500:]]), headers=headers)
        for answer in (whole, chunks):
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


def test_a_full_queue_says_when_to_come_back(tiny_moe: Llama) -> None:
    with running(tiny_moe, replace(LIMITS, running=1, queue=1)) as server, server.client() as client:
        body = {"model": "tiny", "stream": True, **LONG}
        with client.stream("POST", TEXT, json=body) as one:
            next(one.iter_lines())  # it runs
            with httpx.Client(base_url=server.url, timeout=60) as other:
                refused = other.post(TEXT, json={**body, "stream": False, "n": 2})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        server.wait_until_idle()


def test_a_request_over_time_ends_with_408(tiny_moe: Llama) -> None:
    with running(tiny_moe, replace(LIMITS, seconds=0.001)) as server:
        answer = server.post(TEXT, LONG)
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")
        server.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_work_is_cancelled_when_the_client_leaves(tiny_moe: Llama, stream: bool) -> None:
    with running(tiny_moe) as server:
        leave(server, {**LONG, "n": 6, "stream": stream}, wait=stream)
        server.wait_until_idle()
        with server.client() as client:
            ended = [line for line in client.get("/metrics").text.splitlines() if "choices_total" in line]
        assert any('reason="cancelled"' in line for line in ended), ended
        assert server.service.engine.pool.n_used == 0


def leave(server: Running, body: dict, wait: bool) -> None:
    """Ask, and hang up without reading to the end; `wait` for the first bytes."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps({"model": "tiny", **body}).encode()
    head = (
        f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + content)
        if wait:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        else:
            while not server.service.scheduler.n_running:
                pass


def test_a_mailbox_holds_no_more_than_its_room() -> None:
    async def scene() -> list[int]:
        woken = []
        mailbox = Mailbox(2, lambda: woken.append(1))
        assert not mailbox.is_full()
        for token_id in (5, 6):
            mailbox.put(Written(0, token_id, (), None))
        assert mailbox.is_full()
        assert not woken
        events = await mailbox.take()
        assert not mailbox.is_full()
        assert woken
        return [event.token_id for event in events]

    assert asyncio.run(scene()) == [5, 6]


def test_health_and_readiness_follow_the_state(tiny_moe: Llama) -> None:
    with running(tiny_moe) as server, server.client() as client:
        assert client.get("/ready").status_code == 200
        server.service.scheduler.refuse()
        assert client.get("/health").json()["status"] == "stopping"
        assert client.get("/ready").status_code == 503
        refused = client.post(TEXT, json={"model": "tiny", "prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")


def test_metrics_count_what_happened(tiny_moe: Llama) -> None:
    with running(tiny_moe) as server, server.client() as client:
        server.post(TEXT, {"prompt": IDS, "max_tokens": 4})
        server.post(TEXT, {"prompt": IDS, "max_tokens": 1000})
        text = client.get("/metrics").text
    assert 'workbench_tokens_total{phase="prefill"} 20.0' in text
    assert 'workbench_requests_total{path="/v1/completions",status="400"} 1.0' in text
    assert "workbench_cache_positions_limit 2560.0" in text
