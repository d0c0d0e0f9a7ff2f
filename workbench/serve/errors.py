"""Errors as clients of the OpenAI API know them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from workbench.errors import WorkbenchError

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer with an error status. `param` names the field of the request that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status in (408, 413):  # the rest of the body is not waited for
            headers["Connection"] = "close"
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    return ApiError(400, message, param, code)


@contextmanager
def naming(param: str | None) -> Iterator[None]:
    """What the workbench refuses inside is the fault of this field, or of the one that its message begins with."""
    try:
        yield
    except WorkbenchError as error:
        inner = re.match(r"(messages\[\d+\])", str(error))
        raise invalid(inner.group(1) if inner else param, str(error)) from None


def field_name(location: Sequence[Any]) -> str | None:
    """("body", "messages", 0, "content", "str") -> "messages[0].content"; names of alternatives are left out."""
    name = ""
    for part in location[1:]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif re.fullmatch(r"[a-z_][a-z0-9_]*", str(part)) and part not in ALTERNATIVES:
            name += f".{part}" if name else str(part)
    return name or None


ALTERNATIVES = ("str", "int", "float", "bool", "none", "function_after", "json_invalid")


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first thing that is wrong with a request's shape."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return invalid(None, "body: expected JSON, got something else. Send an object.")
    param = field_name(first["loc"])
    if param is None and first["type"] == "model_attributes_type":
        return invalid(None, "body: expected a JSON object with Content-Type: application/json, got something else.")
    return invalid(param, f"{param or 'body'}: {first['msg']}.", str(first["type"]))
