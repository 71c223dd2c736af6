"""`bench serve`: figures from given times, the schedule on a fake clock, reading of streams and files."""

from __future__ import annotations

import asyncio
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from redraft.bench.load import client, drive
from redraft.bench.load.client import Events, Refused, take
from redraft.bench.load.figures import Record, Run, figures, in_flight, parse_limits, throughput
from redraft.bench.load.workload import Ask, Load, Words, poisson, read_trace
from redraft.errors import InvalidInput

# ---- figures


def record(sent: float, chunks: list[float], tokens: int, read: int = 10, ended: float | None = None, **more: Any) -> Record:
    ended = chunks[-1] if ended is None else ended
    return Record(sent=sent, chunks=chunks, ended=ended, input_tokens=read, output_tokens=tokens, counted="usage", done=True, **more)


def test_figures_are_those_of_the_times() -> None:
    """Two requests with several tokens in a chunk, one with a single token, a failure, and one that Ctrl-C left open."""
    run = Run(
        [
            record(0.0, [0.5, 1.0, 2.0], 7, due=0.0),  # ttft 500, itl 500 and 1000, e2el 2000, tpot 1500 / 6
            record(1.0, [1.25, 1.5], 3, read=20, ended=2.25, due=0.75),  # ttft 250, itl 250, e2el 1250, tpot 1000 / 2
            record(2.0, [3.0], 1, due=2.0, wanted_input=10),  # ttft = e2el = 1000, no tpot, no itl
            Record(due=1.0, sent=1.5, failure=("HTTP 429", "no")),
            Record(due=9.0),
        ],
        4.0,
        interrupted=True,
    )
    found = figures(run, {"ttft": 500, "tpot": 250})
    assert {name: found[name] for name in ("duration", "completed", "failed", "unfinished")} == {
        "duration": 4.0,
        "completed": 3,
        "failed": 1,
        "unfinished": 1,
    }
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (40, 11)
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (0.75, 2.75, 12.75)
    assert (found["mean_ttft_ms"], found["median_ttft_ms"]) == (pytest.approx(1750 / 3), 500)
    assert found["p99_ttft_ms"] == pytest.approx(500 + 0.98 * 500), "linear between the two nearest"
    assert found["std_ttft_ms"] == pytest.approx(math.sqrt(sum((x - 1750 / 3) ** 2 for x in (500, 250, 1000)) / 3))
    assert (found["mean_tpot_ms"], found["std_tpot_ms"]) == (375, 125), "by tokens, and none for a single one"
    assert found["mean_itl_ms"] == pytest.approx((500 + 1000 + 250) / 3), "between chunks, however many tokens they have"
    assert (found["mean_e2el_ms"], found["median_e2el_ms"]) == (pytest.approx(4250 / 3), 1250)
    assert found["mean_tokens_per_chunk"] == 11 / 6
    assert (found["good"], found["request_goodput"]) == (1, 0.25), "the second is over its tpot, the third over its ttft"
    assert figures(run, {"tpot": 250})["good"] == 2, "a single token keeps any limit per token"
    assert (found["max_lag_ms"], found["p99_lag_ms"]) == (500, pytest.approx(250 + 0.97 * 250)), "of all that were sent"
    assert found["failures"] == {"HTTP 429": 1} and found["input_tokens_as_wanted"] == 1 and "redraft" not in found
    assert found["max_concurrent_requests"] == 2, "the third begins when the first ends, so they do not overlap"
    assert found["max_output_tokens_per_s"] == pytest.approx(7 / 3 * 1 + 3), "seconds [1, 2): a chunk of the first and both of the second"


def test_the_keys_are_vllms() -> None:
    """The keys that `vllm bench serve --save-result` writes."""
    names = "duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput output_throughput"
    names += " total_token_throughput max_output_tokens_per_s max_concurrent_requests"
    keys = [*names.split(), *(f"{which}_{of}_ms" for of in ("ttft", "tpot", "itl", "e2el") for which in ("mean", "median", "std", "p99"))]
    found = figures(Run([record(0, [1, 2], 2)], 2), {})
    assert list(found)[: len(keys)] == keys and found["request_goodput"] is None


def test_nothing_measured_is_null_and_not_zero() -> None:
    found = figures(Run([Record(sent=0.0, failure=("timeout", ""))], 1.0), {})
    assert found["mean_ttft_ms"] is None and found["p99_itl_ms"] is None and found["mean_tokens_per_chunk"] is None
    assert (found["completed"], found["failed"], found["output_throughput"], found["max_concurrent_requests"]) == (0, 1, 0, 0)


def test_over_time() -> None:
    done = [record(0.0, [0.5, 1.5], 4), record(1.0, [1.75], 3, ended=1.75)]
    assert throughput(done, 0.5).tolist() == [0, 2, 0, 5]
    times, counts = in_flight(done)
    assert times.tolist() == [0, 1, 1.5, 1.75] and counts.tolist() == [1, 2, 1, 0]


def test_what_drafting_did_is_summed_over_the_replies() -> None:
    one, two = ({"steps": 4, "drafted": 9, "accepted": 3, "time": 0.5}, {"steps": 6, "drafted": 11, "accepted": 2})
    found = figures(Run([record(0, [1], 1, metrics=one), record(0, [1], 1, metrics=two), record(0, [1], 1)], 2), {})
    assert found["redraft"] == {"requests": 2, "steps": 10, "drafted": 20, "accepted": 5, "mean_acceptance_length": 1.5}


def test_limits() -> None:
    limits = {"ttft": 500, "tpot": 50, "e2el": 5000}
    assert parse_limits(["ttft:500 tpot:50", "e2el:5e3"]) == parse_limits(["ttft:500,tpot:50,e2el:5000"]) == limits
    for wrong in ("itl:5", "ttft", "ttft:", "ttft:-1", "ttft:nan", "ttft:inf", "5"):
        with pytest.raises(InvalidInput, match="ttft:MS, tpot:MS, e2el:MS"):
            parse_limits([wrong])


# ---- the stream

STREAM = ': hello\r\n\r\ndata: {"a": "é☃"}\n\nevent: x\ndata:one\r\ndata: two\r\n\r\n\n\nretry: 3\n\ndata: [DONE]\n\n'.encode()
DATA = ['{"a": "é☃"}'.encode(), b"one\ntwo", b"[DONE]"]


def test_events_are_the_same_wherever_the_stream_is_cut() -> None:
    for i in range(len(STREAM) + 1):
        for j in range(i, len(STREAM) + 1, 7):
            events = Events()
            assert [data for piece in (STREAM[:i], STREAM[i:j], STREAM[j:]) for data in events.feed(piece)] == DATA, (i, j)
            assert list(events.end()) == []


def test_an_event_without_its_empty_line_counts_at_the_end() -> None:
    events = Events()
    assert list(events.feed(b"data: 1\n\ndata: 2")) == [b"1"] and list(events.end()) == [b"2"]


def taken(*events: Any) -> Record:
    """What a record holds after events that came at 1, 2, 3 ..."""
    found = Record(sent=0.0)
    for at, event in enumerate(events, 1):
        take(found, event if isinstance(event, bytes) else json.dumps(event).encode(), float(at))
    return found


def chat(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def text(words: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": words, "finish_reason": reason}], "usage": None}


USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 9}}


def test_a_chunk_counts_where_it_brings_a_token() -> None:
    said = taken(text("a b c"), text(""), text("d"), text("", "length"), USAGE, b"[DONE]")
    assert (said.chunks, said.ended, said.text) == ([1, 2, 3], 4, "a b cd"), "also one that has no text yet"
    assert (said.input_tokens, said.output_tokens, said.counted) == (5, 9, "usage")
    said = taken(chat({"role": "assistant", "content": ""}), chat({"content": "a"}), chat({"content": "b"}, "stop"), USAGE)
    assert (said.chunks, said.ended) == ([2, 3], 3), "a role is no token; the last token and the end may come together"
    said = taken(chat({"role": "assistant", "content": "a"}), chat({"reasoning_content": "b", "content": None}), chat({}, "stop"))
    assert (said.chunks, said.ended, said.text) == ([1, 2], 3, "ab")
    assert taken(chat({"tool_calls": [{}]})).chunks == [1]
    assert taken(USAGE | {"metrics": {"steps": 3}}).metrics == {"steps": 3}
    both = taken(text("a", "stop") | {"usage": {"prompt_tokens": 1, "completion_tokens": 2}})
    assert (both.chunks, both.output_tokens) == ([1], 2), "usage beside the text"


@pytest.mark.parametrize(
    ("event", "kind", "words"),
    [
        ({"error": {"message": "out of \x1b pages"}}, "error event", "out of   pages"),
        (b"{", "bad stream", "makes no sense: {"),
        (b"[1]", "bad stream", "makes no sense"),
        (b'"\xff"', "bad stream", "makes no sense"),
        ({"choices": [None]}, "bad stream", "makes no sense"),
        ({"choices": {"a": 1}}, "bad stream", "makes no sense"),
        ({"choices": [], "usage": {"completion_tokens": "many"}}, "bad stream", "makes no sense"),
    ],
)
def test_what_makes_no_sense_is_refused(event: Any, kind: str, words: str) -> None:
    with pytest.raises(Refused) as refused:
        taken(event)
    assert refused.value.args[0] == kind and words in refused.value.args[1]


# ---- arrivals


def test_poisson_is_of_its_seed_and_its_rate() -> None:
    times = poisson(2000, 4.0, 0)
    assert times == poisson(2000, 4.0, 0) != poisson(2000, 4.0, 1)
    assert times[-1] == pytest.approx(500) and times == sorted(times)
    assert poisson(2000, 8.0, 0) == pytest.approx([at / 2 for at in times])
    gaps = [after - before for before, after in zip([0.0, *times], times)]
    for share in (0.5, 1.0, 2.0):  # of an exponential distribution e^-x are longer than x times the mean; 5 standard errors
        expected = math.exp(-share)
        found = sum(gap > share * 0.25 for gap in gaps) / 2000
        assert abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / 2000)
    assert poisson(3, math.inf, 0) == [0, 0, 0]


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:18:04.4799600,110,27
"""


def test_traces(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(AZURE.rstrip())
    assert read_trace(path) == [(0, 4808, 10), (pytest.approx(0.052, abs=1e-6), 3180, 8), (pytest.approx(60.5, abs=1e-6), 110, 27)]
    assert len(read_trace(path, 2)) == 2
    warmups, asks = Load(trace=path, scale=10, warmups=1).asks()
    assert [(ask.input_len, ask.output_len) for ask in asks] == [(4808, 10), (3180, 8), (110, 27)]
    assert [ask.due for ask in asks] == pytest.approx([0, 0.0052, 6.05], abs=1e-6)
    assert [(ask.index, ask.due, ask.input_len) for ask in warmups] == [(3, None, 4808)], "the same lengths, other words"
    path.write_text("input,arrival,output,user\n7,3.5,2,a\n8,1.5,3,b\n")
    assert read_trace(path) == [(0, 8, 3), (2, 7, 2)], "by name and in the order of time"


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        ("a,b\n1,2\n", "needs the columns TIMESTAMP,ContextTokens,GeneratedTokens or arrival,input,output"),
        ("arrival,input,output\n", "has no rows"),
        ("arrival,input,output\n1,2,3\n1,2\n", "line 3: needs a time and two whole numbers"),
        ("arrival,input,output\nsoon,2,3\n", "line 2: needs a time"),
        ("arrival,input,output\nnan,2,3\n", "line 2: needs a time"),
        ("arrival,input,output\n1,2,0\n", "line 2: lengths must be 1 or more"),
    ],
)
def test_a_wrong_trace_is_reported_by_line(tmp_path: Path, words: str, reported: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(words)
    with pytest.raises(InvalidInput, match=re.escape(reported)):
        read_trace(path)


# ---- prompts


def test_random_prompts_have_their_length_and_share_what_they_should() -> None:
    warmups, asks = Load(rate=1, count=8, shared=20, groups=2, input_len=12, warmups=2).asks()
    words = Words(overhead=2)  # a token before the text, and its first word
    texts = [words.prompt(ask, 0).split() for ask in asks + warmups]
    assert [len(text) + 1 for text in texts] == [32] * 10
    starts = [tuple(text[:19]) for text in texts]
    assert sorted(starts.count(start) for start in set(starts)) == [5, 5], "each group as often as the other"
    assert len({tuple(text[19:]) for text in texts}) == 10, "what is not shared differs"
    assert len({text[19] for text in texts if tuple(text[:19]) == starts[0]}) > 1, "from its first word on"
    assert [ask.group for ask in asks] != [0, 1] * 4, "in no order"
    assert texts == [words.prompt(ask, 0).split() for ask in asks + warmups] != [words.prompt(ask, 1).split() for ask in asks + warmups]
    assert [ask.due is None for ask in asks + warmups] == [False] * 8 + [True] * 2


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    hello = [{"role": "user", "content": "hello"}]
    lines = [{"prompt": "a", "max_tokens": 3, "id": 1}, {"messages": hello, "output_len": 5}, {"prompt": "c"}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    warmups, asks = Load(prompts=path, output_len=9, concurrency=2).asks()
    assert asks == [Ask(0, None, 3, prompt="a"), Ask(1, None, 5, messages=hello), Ask(2, None, 9, prompt="c")]
    assert warmups == [Ask(3, None, 3, prompt="a")], "the file is repeated"
    assert [ask.prompt for ask in Load(prompts=path, count=5).asks()[1]] == ["a", None, "c", "a", None]
    for line in ('{"prompt": 1}', '{"text": "a"}', '{"prompt": "a", "messages": []}', '{"prompt": "a", "max_tokens": 0}', "{", "3"):
        path.write_text('{"prompt": "a"}\n' + line)
        with pytest.raises(InvalidInput, match="line 2: "):
            Load(prompts=path).asks()


# ---- when requests are sent


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop with a clock that jumps to the next timer."""

    at = 0.0

    def time(self) -> float:
        return self.at

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.at = max(self.at, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def driven(dues: list[float | None], takes: list[float], concurrency: int | None, stop: float | None = None) -> Run:
    """Requests that take this many seconds each. Ctrl-C comes at `stop`."""

    class Sent:
        def restart(self) -> None:
            self.zero = loop.time()

        def now(self) -> float:
            return loop.time() - self.zero

        async def send(self, body: bytes, record: Record) -> None:
            record.sent = self.now()
            await asyncio.sleep(takes[int(body)])
            record.chunks, record.done = [self.now()], True

    async def run() -> Run:
        asks = [Ask(i, due, 1) for i, due in enumerate(dues)]
        task = asyncio.ensure_future(drive.drive(Sent(), asks, lambda ask: str(ask.index).encode(), concurrency, lambda record: None))  # type: ignore[arg-type]
        if stop is not None:
            loop.call_later(stop, task.cancel)
        return await task

    loop = VirtualTime()
    try:
        return loop.run_until_complete(run())
    finally:
        loop.close()


def test_open_loop_never_waits_for_an_answer() -> None:
    run = driven([0.0, 1.0, 1.5, 4.0], [10.0, 1.0, 9.0, 0.5], None)
    assert [one.sent for one in run.records] == [0, 1, 1.5, 4] and run.duration == 10.5 and not run.interrupted


def test_open_loop_with_too_few_slots_shows_what_waited() -> None:
    run = driven([0.0, 1.0, 2.0], [5.0, 5.0, 1.0], 1)
    assert [one.sent for one in run.records] == [0, 5, 10] and [one.lag for one in run.records] == [0, 4, 8]


def test_closed_loop_sends_when_another_has_ended() -> None:
    run = driven([None] * 5, [4.0, 1.0, 1.0, 5.0, 1.0], 2)
    assert [one.sent for one in run.records] == [0, 0, 1, 2, 4] and run.records[0].lag is None and run.duration == 7


def test_ctrl_c_keeps_what_was_measured() -> None:
    run = driven([0.0, 1.0, 2.0, 9.0], [1.5, 6.0, 1.0, 1.0], None, stop=4.0)
    assert run.interrupted and run.duration == 4 and [one.done for one in run.records] == [True, False, True, False]
    assert run.records[3].sent is None and figures(run, {})["unfinished"] == 2


def test_v1_may_stand_at_the_end_of_the_address() -> None:
    assert client.Target("http://a:1/v1/").root == client.Target("http://a:1").root == "http://a:1"
