"""What can go wrong, as types: each carries an HTTP status, the OpenAI error fields and a next step."""

from __future__ import annotations

from typing import Any


class SupervisorError(Exception):
    """Base of all errors a user sees.

    `status` is the HTTP status, `type` and `code` go into the OpenAI error envelope, `param` names the
    offending request field, and `retry_after` (seconds) becomes the `Retry-After` header.
    """

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return the OpenAI error envelope."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class BadRequest(SupervisorError):
    """The request cannot be understood (400)."""

    status = 400
    type = "invalid_request_error"


class NotFound(SupervisorError):
    """No route has that path (404), in llama-server's words."""

    status = 404
    type = "not_found_error"


class MethodNotAllowed(SupervisorError):
    """The path is there, but not for that method (405)."""

    status = 405
    type = "invalid_request_error"


class NotSupported(SupervisorError):
    """llama-server was not started for this (501), in its words."""

    status = 501
    type = "not_supported_error"


class BodyTooLarge(SupervisorError):
    """The request body is over `api.max_body_mb` (413)."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class BodyStalled(SupervisorError):
    """The client stopped in the middle of the request body for `api.stall_seconds` (408)."""

    status = 408
    type = "invalid_request_error"
    code = "body_stalled"


class ModelNotFound(SupervisorError):
    """No model has that name (404). `near` holds names that look alike, best first."""

    status = 404
    type = "not_found_error"
    code = "model_not_found"

    def __init__(self, model: str, near: list[str], available: int) -> None:
        if near:
            hint = "did you mean " + " or ".join(repr(name) for name in near) + "?"
        elif available:
            hint = "GET /v1/models lists what is there"
        else:
            hint = "the models folder is empty: put a GGUF file there"
        super().__init__(f"model {model!r} not found; {hint}", param="model")
        self.near = near

    def body(self) -> dict[str, Any]:
        """Return the envelope with the near names beside the message."""
        body = super().body()
        body["error"]["near"] = self.near
        return body


class InvalidApiKey(SupervisorError):
    """The request needs an API key, and has none that is valid (401)."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class MissingScope(SupervisorError):
    """The API key may not do this (403)."""

    status = 403
    type = "permission_error"
    code = "missing_scope"


class ModelNotAllowed(SupervisorError):
    """The API key may not use this model (403)."""

    status = 403
    type = "permission_error"
    code = "model_not_allowed"


class PriorityNotAllowed(SupervisorError):
    """The API key may not ask for that priority (403)."""

    status = 403
    type = "permission_error"
    code = "priority_not_allowed"


class RateLimited(SupervisorError):
    """The API key has used up its requests or tokens for now (429)."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class ModelInvalid(SupervisorError):
    """The model's file is there but cannot be served (422)."""

    status = 422
    type = "invalid_request_error"
    code = "model_invalid"


class NotLoaded(SupervisorError):
    """The request must not start a model, and the model is not running (503)."""

    status = 503
    type = "unavailable_error"
    code = "model_not_loaded"


class ModelTooLarge(SupervisorError):
    """The model cannot fit into the memory budget, even alone (507). To wait changes nothing: no `Retry-After`."""

    status = 507
    type = "unavailable_error"
    code = "model_too_large"


class Queued(SupervisorError):
    """Base of what ends a request in or before the queue of `model`.

    `position` is its place there, from 1, and `length` how many wait.
    """

    def __init__(self, message: str, position: int, length: int, retry_after: float) -> None:
        super().__init__(message, param="model", retry_after=retry_after)
        self.position = position
        self.length = length

    def body(self) -> dict[str, Any]:
        """Return the envelope with the place in the queue beside the message."""
        body = super().body()
        body["error"] |= {"queue_position": self.position, "queue_length": self.length}
        return body


class QueueFull(Queued):
    """Too many requests wait for this model already (429)."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, model: str, position: int, length: int, retry_after: float) -> None:
        message = f"{length} requests wait for model {model!r} already; this one would be number {position}"
        super().__init__(message, position, length, retry_after)


class WaitTimeout(Queued):
    """The request waited `inference.queue_timeout_seconds` without getting its model (503)."""

    status = 503
    type = "unavailable_error"
    code = "wait_timeout"

    def __init__(self, model: str, position: int, length: int, waited: float, retry_after: float) -> None:
        message = f"waited {waited:.0f} s for model {model!r}; this request was number {position} of {length}"
        super().__init__(message, position, length, retry_after)


class StartFailed(SupervisorError):
    """The model's llama-server did not become ready (503). The message ends with its last log lines."""

    status = 503
    type = "unavailable_error"
    code = "model_start_failed"


class ChildFailed(SupervisorError):
    """The model's llama-server went away while it served this request (502)."""

    status = 502
    type = "server_error"
    code = "upstream_failed"


class ChildDied(ChildFailed):
    """The model's llama-server died while it served this request (502)."""


class ChildHung(ChildDied):
    """The model's llama-server hung while it served this request, and was killed (504)."""

    status = 504
    type = "server_error"
    code = "upstream_hung"


class ShuttingDown(SupervisorError):
    """The supervisor is stopping and takes no new work (503)."""

    status = 503
    type = "unavailable_error"
    code = "shutting_down"


class ConfigInvalid(SupervisorError):
    """The configuration cannot be taken over (422). `problems` holds one line for each mistake."""

    status = 422
    type = "invalid_request_error"
    code = "config_invalid"

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n  ".join(["the configuration cannot be used:", *problems]))
        self.problems = problems

    def body(self) -> dict[str, Any]:
        """Return the envelope with the problems beside the message."""
        body = super().body()
        body["error"]["problems"] = self.problems
        return body


class ConfigError(Exception):
    """The configuration cannot be used. `problems` holds one line for each mistake."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
