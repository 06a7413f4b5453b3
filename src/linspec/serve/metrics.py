"""Metrics for Prometheus under the names that vLLM gives them, with the prefix `linspec:`.

    metrics = Metrics()
    worker.observe(metrics.watch("smollm2", worker))
    text = metrics.text()

Counts and times come from the worker's thread, behind its steps; what is so at the moment is read when it is
asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from linspec.decoding.outcome import Outcome
from linspec.decoding.sequence import UNPLACED

if TYPE_CHECKING:
    from linspec.serve.worker import Job, Stepped, Worker

PREFIX = "linspec:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MODEL = "model_name"

# name, help and further labels
COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "prompt_tokens": ("Prompt tokens of sequences whose prompt is read.", ()),
    "generation_tokens": ("Tokens that were generated.", ()),
    "rounds": ("Rounds of all sequences; generation tokens per round are tokens per round.", ()),
    "prefix_cache_queries": ("Prompt tokens that were looked up in the prefix cache.", ()),
    "prefix_cache_hits": ("Prompt tokens that the prefix cache had.", ()),
    "num_preemptions": ("Times that a running sequence gave its slot to another.", ()),
    "request_success": ("Outputs that ended, by why.", ("finished_reason",)),
    "spec_decode_num_drafts": ("Rounds with drafts.", ("drafter",)),
    "spec_decode_num_draft_tokens": ("Tokens that were drafted.", ("drafter",)),
    "spec_decode_num_accepted_tokens": ("Drafted tokens that were accepted.", ("drafter",)),
    "spec_decode_num_accepted_tokens_per_pos": (
        "Accepted tokens by their depth in the tree, from 0.",
        ("drafter", "position"),
    ),
}
# a step of a small model takes a millisecond
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0)
_LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("From the request to its first token.", (*_SHORT, 40.0, 160.0)),
    "inter_token_latency_seconds": ("Between two rounds that brought a sequence tokens.", _SHORT),
    "request_time_per_output_token_seconds": ("Of decoding, for each token of a request.", _SHORT),
    "e2e_request_latency_seconds": ("From the request to its end.", _LONG),
    "request_queue_time_seconds": ("Waiting for a slot.", _LONG),
    "request_prefill_time_seconds": ("From the slot to the first token.", _LONG),
    "request_decode_time_seconds": ("From the first token to the last.", _LONG),
    "step_seconds": ("A step of the engine.", _SHORT),
}
GAUGES = {
    "num_requests_running": "Sequences that have a slot.",
    "num_requests_waiting": "Sequences that wait for one.",
    "max_num_seqs": "Slots.",
    "kv_cache_usage_perc": "Share of the memory of states that is taken, of the slots without a limit.",
    "state_bytes": "Memory of the states of running sequences.",
}
REFUSED = "requests_refused"


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._counters = {
            name: Counter(PREFIX + name, told, (MODEL, *labels), registry=self.registry)
            for name, (told, labels) in COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(PREFIX + name, told, (MODEL,), registry=self.registry, buckets=buckets)
            for name, (told, buckets) in HISTOGRAMS.items()
        }
        self._live = _Live()
        self.registry.register(self._live)

    def watch(self, model: str, worker: Worker) -> ModelMetrics:
        """The observer of a worker, whose model is called `model`."""
        self._live.workers[model] = worker
        return ModelMetrics(model, self._counters, self._histograms)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)


class _Live(Collector):
    """What is so at the moment."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}

    def collect(self) -> Iterator[Metric]:
        for name, told in GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, told, labels=(MODEL,))
            for model, worker in self.workers.items():
                gauge.add_metric((model,), _now(worker)[name])
            yield gauge
        refused = CounterMetricFamily(
            PREFIX + REFUSED, "Requests that found the queue full.", labels=(MODEL,)
        )
        for model, worker in self.workers.items():
            refused.add_metric((model,), worker.refused)
        yield refused


def _now(worker: Worker) -> dict[str, float]:
    running, used = worker.running, state_bytes(worker)
    memory = worker.llm.engine.scheduler.memory
    return {
        "num_requests_running": running,
        "num_requests_waiting": worker.waiting,
        "max_num_seqs": worker.slots,
        "kv_cache_usage_perc": running / worker.slots if memory is None else used / memory.limit,
        "state_bytes": used,
    }


def state_bytes(worker: Worker) -> int:
    """Memory of the states of running sequences."""
    engine = worker.llm.engine
    # who is pre-empted meanwhile has no slot
    slots = [each.slot for each in list(engine.scheduler.running)]
    return engine.state.bytes(*(slot for slot in slots if slot != UNPLACED))


class _OpenJob:
    """What is known of a job that has not ended.

    last: when each sequence got tokens, and how often it was pre-empted until then. tokens: of all of them.
    """

    def __init__(self) -> None:
        self.last: dict[int, tuple[float, int]] = {}
        self.tokens = 0


class ModelMetrics:
    """The observer of one worker; see `Observer`."""

    def __init__(
        self, model: str, counters: dict[str, Counter], histograms: dict[str, Histogram]
    ) -> None:
        self.model = model
        self._families = counters
        self._counters = {
            name: family.labels(model) for name, family in counters.items() if not COUNTERS[name][1]
        }
        self._times = {name: family.labels(model) for name, family in histograms.items()}
        # with further labels, by name and these
        self._labelled: dict[tuple[str, ...], Any] = {}
        self._open: dict[int, _OpenJob] = {}

    def _count(self, name: str, amount: float, *labels: str) -> None:
        key = (name, *labels)
        if key not in self._labelled:
            self._labelled[key] = self._families[name].labels(self.model, *labels)
        self._labelled[key].inc(amount)

    def queued(self, job: Job) -> None:
        """Nothing is counted before it runs."""

    def started(self, job: Job) -> None:
        """It has a slot."""
        if job.started is not None:
            self._times["request_queue_time_seconds"].observe(max(0.0, job.started - job.queued))

    def stepped(self, step: Stepped) -> None:
        """Tokens, drafts and intervals of a step."""
        self._times["step_seconds"].observe(step.seconds)
        now = step.began + step.seconds
        for job, outcome in step.outcomes:
            if outcome.tokens:
                self._tokens(self._known(job), outcome, now)
            if outcome.tree is not None and outcome.accepted is not None:
                self._drafts(outcome, len(outcome.tree) - 1, len(outcome.accepted.path) - 1)

    def _known(self, job: Job) -> _OpenJob:
        """What is known of a job that gets tokens; its first ones are counted here."""
        if job.number not in self._open:
            self._open[job.number] = _OpenJob()
            if job.first is not None and job.started is not None:
                self._times["time_to_first_token_seconds"].observe(job.first - job.queued)
                self._times["request_prefill_time_seconds"].observe(job.first - job.started)
        return self._open[job.number]

    def _tokens(self, job: _OpenJob, outcome: Outcome, now: float) -> None:
        sequence, count = outcome.sequence, len(outcome.tokens)
        job.tokens += count
        self._counters["generation_tokens"].inc(count)
        self._counters["rounds"].inc()
        before, preempted = job.last.get(sequence.number, (None, 0))
        job.last[sequence.number] = now, sequence.preempted
        self._counters["num_preemptions"].inc(sequence.preempted - preempted)
        if before is None:
            self._counters["prompt_tokens"].inc(sequence.prompt_tokens)
        else:
            self._times["inter_token_latency_seconds"].observe(now - before)

    def _drafts(self, outcome: Outcome, drafted: int, accepted: int) -> None:
        name = outcome.drafter
        self._count("spec_decode_num_drafts", 1, name)
        self._count("spec_decode_num_draft_tokens", drafted, name)
        self._count("spec_decode_num_accepted_tokens", accepted, name)
        for position in range(accepted):
            self._count("spec_decode_num_accepted_tokens_per_pos", 1, name, str(position))

    def ended(self, job: Job) -> None:
        """Times of a whole job, and why its outputs ended."""
        known = self._open.pop(job.number, None) or _OpenJob()
        for output in job.finished:
            self._count("request_success", 1, output.finish_reason)
            self._counters["prefix_cache_queries"].inc(output.prompt_tokens)
            self._counters["prefix_cache_hits"].inc(output.cached_tokens)
        if job.left:
            self._count("request_success", job.left, "abort" if job.cancelled else "error")
        if job.ended is None:
            return
        self._times["e2e_request_latency_seconds"].observe(job.ended - job.queued)
        if job.first is None:
            return
        decoding = job.ended - job.first
        self._times["request_decode_time_seconds"].observe(decoding)
        # its sequences decode side by side
        further = known.tokens / job.sequences - 1
        if further > 0:
            self._times["request_time_per_output_token_seconds"].observe(decoding / further)


def metric_names() -> set[str]:
    """Every name that Prometheus has of a server, with its prefix and endings."""
    counters = {f"{name}_total" for name in (*COUNTERS, REFUSED)}
    parts = {f"{name}_{end}" for name in HISTOGRAMS for end in ("bucket", "sum", "count")}
    return {PREFIX + name for name in counters | parts | set(GAUGES)}
