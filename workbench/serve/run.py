"""Starting and stopping a server on a machine: who may reach it, and what a signal does."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from workbench.errors import ConfigError
from workbench.serve.app import create_app
from workbench.serve.service import Service

SHORTEST_KEY = 16


def check_address(host: str, port: int, api_key: str | None) -> None:
    """Raises ConfigError for an address that others can reach without an API key, and for a key that can be guessed."""
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"port: expected a number from 0 to {(1 << 16) - 1}, got {port}.")
    if api_key is not None and (len(api_key) < SHORTEST_KEY or not all("!" <= char <= "~" for char in api_key)):
        raise ConfigError(
            f"api key: expected at least {SHORTEST_KEY} ASCII characters that can be seen, got fewer or others. "
            "Make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    is_loopback = _is_loopback(host)  # asked with a key too: a name that stands for nothing shows here
    if api_key is None and not is_loopback:
        raise ConfigError(
            f"host: expected a loopback address without an API key, got {host!r}. Pass --api-key-file, or set "
            "WORKBENCH_API_KEY."
        )


def _is_loopback(host: str) -> bool:
    """Whether every address that the name stands for is this machine's own."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        raise ConfigError(f"host: expected an address of this machine, got {host!r}. Use 127.0.0.1.") from None
    return bool(found) and all(ipaddress.ip_address(str(one).partition("%")[0]).is_loopback for one in found)


def say(text: str) -> None:
    """Seen at once by whoever reads through a pipe."""
    print(text, flush=True)


class Server(uvicorn.Server):
    """On SIGTERM or SIGINT: new work is refused at once, what runs is finished, for `drain_seconds` at most."""

    def __init__(self, service: Service, host: str, port: int, on_start: Callable[[str], object] = say) -> None:
        self.service, self._on_start = service, on_start
        super().__init__(
            uvicorn.Config(
                create_app(service),
                host=host,
                port=port,
                log_level="warning",
                limit_concurrency=service.limits.connections + 1,  # it counts the one that asks
                lifespan="on",
                server_header=False,
                timeout_graceful_shutdown=max(1, int(service.limits.drain_seconds)),
            )
        )

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A first signal stops gracefully, with exit code 0; a second one ends at once."""
        self.service.scheduler.refuse()
        self.should_exit, self.force_exit = True, self.should_exit

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            self._on_start(f"serving {self.service.identity.name} on http://{shown}:{port}/v1")


def serve(service: Service, host: str, port: int) -> None:
    """Serve until told to stop. Raises ConfigError when the address cannot be used."""
    check_address(host, port, service.identity.api_key)
    server = Server(service, host, port)
    try:
        server.run()
    except SystemExit:  # uvicorn's way to say that it could not bind; the reason is in its log
        raise ConfigError(f"port: expected {host}:{port} to be free, got none. Use another port.") from None
