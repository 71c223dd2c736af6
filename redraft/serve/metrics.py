"""Figures for Prometheus, under the names that dashboards know."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from redraft.engine.engine import Engine
    from redraft.engine.output import Event
    from redraft.serve.shell import Submission

FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
SHARE = 0.1  # of the latest request in the running mean of how long they take


class Metrics:
    """The registry of a server. prefix: of every name; model: its label. For the event loop only."""

    def __init__(self, prefix: str, model: str) -> None:
        self.registry = CollectorRegistry()
        self.recent = 1.0  # seconds that the latest requests took, as a running mean
        self._labels = {"model_name": model, "engine": "0"}
        self._seen: dict[str, dict[int, Any]] = {}  # request -> text -> statistics already counted
        self._gaps: dict[str, int] = {}  # likewise
        self._engine: Engine | None = None
        self._preempted = 0

        def name(text: str) -> str:
            return prefix + text

        def counter(text: str, what: str, *labels: str) -> Counter:
            return Counter(name(text), what, [*self._labels, *labels], registry=self.registry)

        def histogram(text: str, what: str, buckets: tuple[float, ...]) -> Any:
            return Histogram(name(text), what, [*self._labels], registry=self.registry, buckets=buckets).labels(**self._labels)

        def gauge(text: str, what: str) -> Any:
            return Gauge(name(text), what, [*self._labels], registry=self.registry).labels(**self._labels)

        self.running = gauge("num_requests_running", "Texts that run.")
        self.waiting = gauge("num_requests_waiting", "Texts that wait, including preempted ones.")
        self.usage = gauge("kv_cache_usage_perc", "Share of the cache in use, 0 to 1.")
        self.shared = gauge("kv_cache_shared_pages", "Pages that several texts read.")
        self.published = gauge("kv_cache_published_pages", "Pages that later prompts with the same beginning may read.")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that started.").labels(**self._labels)
        self.generation_tokens = counter("generation_tokens", "Tokens generated.").labels(**self._labels)
        self.queries = counter("prefix_cache_queries", "Tokens looked up in the prefix cache.").labels(**self._labels)
        self.hits = counter("prefix_cache_hits", "Tokens found in the prefix cache.").labels(**self._labels)
        self.success = counter("request_success", "Requests that ended, by reason.", "finished_reason")
        self.drafts = counter("spec_decode_num_drafts", "Passes that verified a draft.").labels(**self._labels)
        self.drafted = counter("spec_decode_num_draft_tokens", "Tokens drafted.").labels(**self._labels)
        self.accepted = counter("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.").labels(**self._labels)
        self.by_depth = counter("spec_decode_num_accepted_tokens_per_pos", "Drafted tokens that were accepted, by position.", "position")
        self.preempted = counter("num_preemptions", "Texts that lost their pages and started again.").labels(**self._labels)
        self.first = histogram("time_to_first_token_seconds", "From arrival to the first token.", FIRST)
        self.between = histogram("inter_token_latency_seconds", "Between steps that gave tokens of a text.", BETWEEN)
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the end.", WHOLE)
        self.queued = histogram("request_queue_time_seconds", "From arrival to the first pass.", WHOLE)
        self.per_prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", COUNTS)
        self.per_text = histogram("request_generation_tokens", "Tokens generated for a request.", COUNTS)
        self.opened = gauge("opened_methods", "Methods opened for requests.")
        self.opened_bytes = gauge("opened_methods_bytes", "Memory of these.")
        for reason in ("stop", "length", "abort", "error"):  # seen from the start, at 0
            self.success.labels(**self._labels, finished_reason=reason)

    def watch(self, engine: Engine) -> None:
        """Sets the source of the gauges, which are read for each exposition."""
        self._engine = engine
        self.running.set_function(lambda: len(engine.running))
        self.waiting.set_function(lambda: len(engine.waiting))
        self.usage.set_function(lambda: engine.memory.used() / engine.memory.blocks)
        self.shared.set_function(engine.memory.paged.table.shared)
        self.published.set_function(lambda: len(engine.memory.paged.table.prefix.nodes))
        self.opened.set_function(lambda: engine.opened.count)
        self.opened_bytes.set_function(lambda: engine.opened.bytes)

    def observe(self, submission: Submission, events: list[Event]) -> None:
        """Counts events of one request, after Submission.add."""
        request = submission.request
        if request.id not in self._seen:
            self._seen[request.id] = {}
            self.prompt_tokens.inc(len(request.prompt))
            self.per_prompt.observe(len(request.prompt))
            self.queries.inc(len(request.prompt))
            self.hits.inc(request.cached_tokens or 0)
            self.queued.observe(max(0.0, (request.admitted or submission.arrived) - submission.arrived))
            self.first.observe((submission.first or monotonic()) - submission.arrived)
        for gap in submission.gaps[self._gaps.get(request.id, 0) :]:
            self.between.observe(gap)
        self._gaps[request.id] = len(submission.gaps)
        for event in events:
            self.generation_tokens.inc(len(event.tokens))
            before, now = self._seen[request.id].get(event.index), event.stats
            self._seen[request.id][event.index] = now
            self.drafts.inc(now.drafts - (before.drafts if before else 0))
            self.drafted.inc(now.drafted - (before.drafted if before else 0))
            self.accepted.inc(now.accepted - (before.accepted if before else 0))
            for depth, count in enumerate(now.by_depth):
                old = before.by_depth[depth] if before and depth < len(before.by_depth) else 0
                if count > old:
                    self.by_depth.labels(**self._labels, position=str(depth)).inc(count - old)

    def ended(self, submission: Submission, reason: str) -> None:
        took = monotonic() - submission.arrived
        self.success.labels(**self._labels, finished_reason=reason).inc()
        self.whole.observe(took)
        self.per_text.observe(submission.tokens)
        self.recent += SHARE * (took - self.recent)
        self._seen.pop(submission.request.id, None)
        self._gaps.pop(submission.request.id, None)

    def exposition(self) -> bytes:
        """The exposition in the format of Prometheus."""
        if self._engine is not None:
            self.preempted.inc(self._engine.preemptions - self._preempted)
            self._preempted = self._engine.preemptions
        return generate_latest(self.registry)
