"""Spans of requests for OpenTelemetry: one of each, with its queue, its prefill and its decoding below it.

    tracing = tracing_of(settings)                     # None unless it is asked for
    worker.observe(tracing.watch("smollm2"))

The variables OTEL_… say where spans go and how the service is called, as everywhere. No text of prompts or
answers is in them.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from linspec.errors import ConfigError
from linspec.serve.settings import Settings
from linspec.serve.shapes import speculation_of

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from linspec.serve.worker import Job, Stepped

_log = logging.getLogger("linspec.serve")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def tracing_of(settings: Settings) -> Tracing | None:
    """What `settings` or the environment ask for; raises ConfigError where --otel lacks its packages."""
    if not (settings.otel or any(os.environ.get(name) for name in _ENDPOINTS)):
        return None
    try:
        return Tracing(_provider())
    except ModuleNotFoundError as error:
        told = f"{error.name} is not installed; pip install 'linspec[serve,otel]'"
        if settings.otel:
            raise ConfigError(f"--otel needs packages of its own: {told}") from error
        # the variable may be meant for other programs
        _log.warning("no spans are sent to the endpoint of OTEL_…: %s", told)
        return None


def _provider() -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # OTEL_SERVICE_NAME goes before it
    named = os.environ.get("OTEL_SERVICE_NAME") or "linspec"
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: named}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class Tracing:
    """Spans of one server, through `provider`."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self.tracer = provider.get_tracer("linspec.serve")

    def watch(self, model: str, clock: Callable[[], float] = time.perf_counter) -> JobSpans:
        """The observer of a worker with that clock, whose model is called `model`."""
        return JobSpans(self.tracer, model, clock)

    def end(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()


class JobSpans:
    """The observer of one worker; see `Observer`. Spans are written when a job has ended, with its times."""

    def __init__(self, tracer: Any, model: str, clock: Callable[[], float]) -> None:
        self._tracer, self._model = tracer, model
        # spans have the time of day, jobs that of a clock which nobody sets back
        self._began = time.time() - clock()

    def queued(self, job: Job) -> None:
        """Its end tells."""

    def started(self, job: Job) -> None:
        """Its end tells."""

    def stepped(self, step: Stepped) -> None:
        """Steps are of many jobs."""

    def ended(self, job: Job) -> None:
        """Write the spans of a job."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        span = self._tracer.start_span(
            f"generate {self._model}",
            _context(job.trace),
            kind=SpanKind.SERVER,
            attributes=dict(_facts(job, self._model)),
            start_time=self._at(job.queued),
        )
        inside = set_span_in_context(span)
        for name, begin, end in _phases(job):
            part = self._tracer.start_span(name, inside, start_time=self._at(begin))
            part.end(self._at(end))
        _tell_failure(span, job)
        span.end(self._at(_end(job)))

    def _at(self, seconds: float) -> int:
        return int((self._began + seconds) * 1e9)


def _context(trace: str) -> Any:
    """Of the caller's span, where its request named one as W3C's traceparent."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": trace})


def _end(job: Job) -> float:
    return job.queued if job.ended is None else job.ended


def _phases(job: Job) -> Iterator[tuple[str, float, float]]:
    """Those that a job came to, each up to the next or to its end."""
    known = (("queue", job.queued), ("prefill", job.started), ("decode", job.first))
    begun = [(name, at) for name, at in known if at is not None]
    ends = [at for _, at in begun[1:]] + [_end(job)]
    for (name, begin), end in zip(begun, ends, strict=True):
        yield name, begin, end


def _facts(job: Job, model: str) -> Iterator[tuple[str, Any]]:
    """Attributes under the names of OpenTelemetry's conventions for language models, where they have one."""
    done = job.finished
    yield "gen_ai.operation.name", "text_completion"
    yield "gen_ai.request.model", model
    yield "gen_ai.usage.input_tokens", sum(len(each.prompt) for each in job.requests)
    yield "gen_ai.usage.output_tokens", sum(len(each.token_ids) for each in done)
    yield "gen_ai.response.finish_reasons", [each.finish_reason for each in done]
    yield "linspec.request_id", job.name
    yield "linspec.outputs", job.sequences
    yield "linspec.cancelled", job.cancelled
    brought = speculation_of(done)
    yield "linspec.tokens_per_round", brought.tokens_per_round
    yield "linspec.accepted_tokens", brought.accepted


def _tell_failure(span: Any, job: Job) -> None:
    from opentelemetry.trace import Status, StatusCode

    failures = (each.error for each in job.finished)
    error = job.error or next((each for each in failures if each is not None), None)
    if error is not None:
        # its message may name what was asked
        span.set_attribute("error.type", type(error).__name__)
        span.set_status(Status(StatusCode.ERROR))
