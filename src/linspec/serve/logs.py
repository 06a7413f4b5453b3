"""Logs as lines of JSON on stderr: time, level, event, and facts; no text of prompts."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager


class JsonLines(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        found = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        return json.dumps(found, default=str)


@contextmanager
def written(level: int = logging.INFO) -> Iterator[None]:
    """While it lasts, linspec's loggers and uvicorn's warnings write such lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    loggers = [(logging.getLogger("linspec"), level)]
    loggers.append((logging.getLogger("uvicorn.error"), logging.WARNING))
    before = [(each, each.level) for each, _ in loggers]
    for logger, least in loggers:
        logger.addHandler(handler)
        logger.setLevel(least)
    try:
        yield
    finally:
        for logger, least in before:
            logger.removeHandler(handler)
            logger.setLevel(least)
