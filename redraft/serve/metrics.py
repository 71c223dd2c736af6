"""Figures for Prometheus, under the names that dashboards know."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from time import monotonic
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from redraft.engine.output import Event
    from redraft.serve.shell import Submission
    from redraft.workers.host import Figures

FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
SHARE = 0.1  # of the latest request in the running mean of how long they take


class Metrics:
    """The registry of a server. prefix: of every name; model: its label; workers: the names of the workers, each a value of the label
    `engine`; figures: gives their state, which is read for each exposition. For the event loop only."""

    def __init__(self, prefix: str, model: str, workers: tuple[str, ...], figures: Callable[[], dict[str, Figures]]) -> None:
        self.registry = CollectorRegistry()
        self.recent = 1.0  # seconds that the latest requests took, as a running mean
        self.model, self.prefix, self.figures = model, prefix, figures
        self._seen: dict[str, dict[int, Any]] = {}  # request -> text -> statistics already counted
        self._gaps: dict[str, int] = {}  # likewise
        self._counted: defaultdict[tuple[str, str], float] = defaultdict(float)  # of each worker and metric
        self._made: dict[str, Any] = {}

        self._gauge("num_requests_running", "Texts that run.")
        self._gauge("num_requests_waiting", "Texts that wait, including preempted ones.")
        self._gauge("kv_cache_usage_perc", "Share of the cache in use, 0 to 1.")
        self._gauge("kv_cache_shared_pages", "Pages that several texts read.")
        self._gauge("kv_cache_published_pages", "Pages that later prompts with the same beginning may read.")
        self._gauge("worker_ready", "Whether the worker takes requests.")
        self._counter("worker_starts", "How often the worker started.")
        self._counter("handover_copied_tokens", "Tokens whose pages were copied from another worker.")
        self._counter("handover_found_tokens", "Tokens of handed-over texts whose pages were there already.")
        self._counter("handover_lost_texts", "Handed-over texts that were computed again, because their pages did not arrive.")
        self._counter("prefix_cache_disk_hits", "Tokens of prefixes that were read from disk.")
        self._counter("prefix_cache_disk_seconds", "Seconds that it took to read them.")
        self._counter("prefix_cache_disk_written_pages", "Pages of prefixes that were written to disk.")
        self._counter("prefix_cache_disk_dropped_pages", "Pages that were not written, because they left memory or the disk was full.")
        self._gauge("prefix_cache_disk_bytes", "Bytes of all prefixes on disk, as the worker counted them last.")
        self._gauge("opened_methods", "Methods opened for requests.")
        self._gauge("opened_methods_bytes", "Memory of these.")
        self._counter("prompt_tokens", "Tokens of prompts that started.")
        self._counter("generation_tokens", "Tokens generated.")
        self._counter("prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self._counter("prefix_cache_hits", "Tokens found in the prefix cache.")
        self._counter("request_success", "Requests that ended, by reason.", "finished_reason")
        self._counter("spec_decode_num_drafts", "Passes that verified a draft.")
        self._counter("spec_decode_num_draft_tokens", "Tokens drafted.")
        self._counter("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.")
        self._counter("spec_decode_num_accepted_tokens_per_pos", "Drafted tokens that were accepted, by position.", "position")
        self._counter("num_preemptions", "Texts that lost their pages and started again.")
        self._histogram("time_to_first_token_seconds", "From arrival to the first token.", FIRST)
        self._histogram("inter_token_latency_seconds", "Between steps that gave tokens of a text.", BETWEEN)
        self._histogram("e2e_request_latency_seconds", "From arrival to the end.", WHOLE)
        self._histogram("request_queue_time_seconds", "From arrival to the first pass.", WHOLE)
        self._histogram("request_prompt_tokens", "Tokens of a prompt.", COUNTS)
        self._histogram("request_generation_tokens", "Tokens generated for a request.", COUNTS)
        self._of = {worker: self._labelled(worker) for worker in workers}  # seen from the start, at 0

    def _gauge(self, name: str, what: str) -> None:
        self._made[name] = Gauge(self.prefix + name, what, ["model_name", "engine"], registry=self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> None:
        self._made[name] = Counter(self.prefix + name, what, ["model_name", "engine", *labels], registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> None:
        self._made[name] = Histogram(self.prefix + name, what, ["model_name", "engine"], registry=self.registry, buckets=buckets)

    def _labelled(self, worker: str) -> SimpleNamespace:
        """The metrics of one worker, as attributes with the names of the metrics."""
        labels = {"model_name": self.model, "engine": worker}
        whole = {name: made for name, made in self._made.items() if len(made._labelnames) == 2}
        for reason in ("stop", "length", "abort", "error"):
            self._made["request_success"].labels(**labels, finished_reason=reason)
        return SimpleNamespace(labels=labels, **{name: made.labels(**labels) for name, made in whole.items()})

    def observe(self, submission: Submission, events: list[Event]) -> None:
        """Counts events of one request, after Submission.add."""
        request, of = submission.request, self._of[submission.worker]
        if request.id not in self._seen:
            self._seen[request.id] = {}
            of.prompt_tokens.inc(len(request.prompt))
            of.request_prompt_tokens.observe(len(request.prompt))
            of.prefix_cache_queries.inc(len(request.prompt))
            of.prefix_cache_hits.inc(request.cached_tokens or 0)
            of.request_queue_time_seconds.observe(max(0.0, (request.admitted or submission.arrived) - submission.arrived))
            of.time_to_first_token_seconds.observe((submission.first or monotonic()) - submission.arrived)
        for gap in submission.gaps[self._gaps.get(request.id, 0) :]:
            of.inter_token_latency_seconds.observe(gap)
        self._gaps[request.id] = len(submission.gaps)
        for event in events:
            of.generation_tokens.inc(len(event.tokens))
            before, now = self._seen[request.id].get(event.index), event.stats
            self._seen[request.id][event.index] = now
            of.spec_decode_num_drafts.inc(now.drafts - (before.drafts if before else 0))
            of.spec_decode_num_draft_tokens.inc(now.drafted - (before.drafted if before else 0))
            of.spec_decode_num_accepted_tokens.inc(now.accepted - (before.accepted if before else 0))
            for depth, count in enumerate(now.by_depth):
                old = before.by_depth[depth] if before and depth < len(before.by_depth) else 0
                if count > old:
                    by_depth = self._made["spec_decode_num_accepted_tokens_per_pos"]
                    by_depth.labels(**of.labels, position=str(depth)).inc(count - old)

    def ended(self, submission: Submission, reason: str) -> None:
        took, of = monotonic() - submission.arrived, self._of[submission.worker]
        self._made["request_success"].labels(**of.labels, finished_reason=reason).inc()
        of.e2e_request_latency_seconds.observe(took)
        of.request_generation_tokens.observe(submission.tokens)
        self.recent += SHARE * (took - self.recent)
        self._seen.pop(submission.request.id, None)
        self._gaps.pop(submission.request.id, None)

    def exposition(self) -> bytes:
        """The exposition in the format of Prometheus."""
        for worker, now in self.figures().items():
            of = self._of[worker]
            of.num_requests_running.set(now.running)
            of.num_requests_waiting.set(now.waiting)
            of.kv_cache_usage_perc.set(now.used / now.blocks)
            of.kv_cache_shared_pages.set(now.shared)
            of.kv_cache_published_pages.set(now.published)
            of.opened_methods.set(now.opened)
            of.opened_methods_bytes.set(now.opened_bytes)
            of.worker_ready.set(now.ready)
            of.prefix_cache_disk_bytes.set(now.disk.bytes)
            for name, count in (
                ("num_preemptions", now.preemptions),
                ("worker_starts", now.starts),
                ("handover_copied_tokens", now.copied),
                ("handover_found_tokens", now.found),
                ("handover_lost_texts", now.lost),
                ("prefix_cache_disk_hits", now.disk.found),
                ("prefix_cache_disk_seconds", now.disk.seconds),
                ("prefix_cache_disk_written_pages", now.disk.written),
                ("prefix_cache_disk_dropped_pages", now.disk.dropped),
            ):
                getattr(of, name).inc(count - self._counted[worker, name])
                self._counted[worker, name] = count
        return generate_latest(self.registry)
