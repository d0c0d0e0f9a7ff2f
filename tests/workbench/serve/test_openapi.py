"""The server against its own OpenAPI document: no 5xx, answers as documented, bad input refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serve_running import Running, running

from workbench.models import Llama

ENDPOINTS = ["/v1/models", "/v1/models/{model}", "/v1/chat/completions", "/v1/completions"]
ENDPOINTS += ["/health", "/ready", "/metrics"]


@pytest.fixture(scope="module")
def server(tiny_moe: Llama) -> Iterator[Running]:
    with running(tiny_moe) as found:
        yield found


@pytest.fixture(scope="module")
def api(server: Running) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_endpoint_is_documented_with_its_errors(server: Running) -> None:
    with server.client() as client:
        found = client.get("/openapi.json").json()
    assert sorted(found["paths"]) == sorted(ENDPOINTS)
    for path in ("/v1/chat/completions", "/v1/completions"):
        responses = found["paths"][path]["post"]["responses"]
        assert set(responses) == {"200", "400", "401", "404", "408", "413", "429", "500", "503"}
        assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}


def short(body: Any) -> None:
    """Where a drawn request is about to be served, let it be by this server, and briefly."""
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = "tiny"
    for name, most in (("max_tokens", 3), ("max_completion_tokens", 3), ("n", 2)):
        if type(body.get(name)) is int and body[name] > most:
            body[name] = most
    if "messages" in body and not {"max_tokens", "max_completion_tokens"} & body.keys():
        body["max_completion_tokens"] = 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_drawn_requests_are_answered_or_refused_as_documented(api: Any, path: str, mode: GenerationMode) -> None:
    """Valid ones, and ones that are wrong somewhere: none is a 5xx, every wrong one is refused."""

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(case=api[path]["POST"].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        short(case.body)
        # a valid request may still be refused: a longer context than there is, an expert that does not exist
        case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=120)

    check()


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/ready", "/metrics"])
def test_plain_endpoints_conform_to_the_document(api: Any, path: str) -> None:
    assert api[path]["GET"].Case().call_and_validate(timeout=120).status_code == 200


@pytest.mark.slow
def test_nothing_is_left_behind(server: Running) -> None:
    server.wait_until_idle()
    assert server.service.scheduler.is_alive
    assert server.service.engine.pool.n_used == 0
