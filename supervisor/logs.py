"""How does the supervisor's own log look? A line of text or a JSON object each, with the request's id."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web import RequestPayloadError

from supervisor.config import LoggingSection
from supervisor.request_id import current


class TextFormatter(logging.Formatter):
    """For people: time, level, message, and the request's id in brackets."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line without a traceback."""
        line = super().formatMessage(record)
        request = current()
        return f"{line} [{request}]" if request else line


class JsonFormatter(logging.Formatter):
    """For programs: `time` (ISO 8601, UTC), `level`, `logger`, `message`, and if any `request_id`, `error`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line of JSON."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request := current():
            line["request_id"] = request
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up(settings: LoggingSection) -> None:
    """Send the log to stderr as the settings say."""
    root = logging.getLogger()
    handler = next((one for one in root.handlers if isinstance(one, _Handler)), None)
    if handler is None:
        handler = _Handler(sys.stderr)
        root.addHandler(handler)
    set_level(settings)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.server").addFilter(_is_ours)


def _is_ours(record: logging.LogRecord) -> bool:
    """Leave out requests that are no HTTP: they are answered with 400, and anybody could fill the log with them."""
    return not (record.exc_info and isinstance(record.exc_info[1], (HttpProcessingError, RequestPayloadError)))


def set_level(settings: LoggingSection) -> None:
    """Take over changed settings; where `set_up` was not called, as in tests, the log is somebody else's."""
    root = logging.getLogger()
    for handler in root.handlers:
        if isinstance(handler, _Handler):
            handler.setFormatter(JsonFormatter() if settings.format == "json" else TextFormatter())
            root.setLevel(settings.level.upper())


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]  # generic for mypy only
    """The one handler of ours."""
