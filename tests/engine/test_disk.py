"""Prefixes from disk: the text that is computed without them, to the bit; no text of another tenant, adapter or model; and no fault of the
disk that a request notices."""

from __future__ import annotations

import errno
import gc
import logging
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from redraft import LLM, Patch, SamplingParams
from redraft.config import EngineConfig
from redraft.core.sequence import Request, Space
from redraft.engine.engine import Engine
from redraft.engine.output import checked
from redraft.errors import InvalidInput
from redraft.kv.disk import files, pages
from redraft.kv.disk.pages import DiskPages
from tests import adapters, checkpoints
from tests.engine.test_resume import Received

PAGE = 32
TEXT = "the cat sat on the mat and the cat sat on the log and the dog sat on the mat. "
POOL = 1 << 22
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.tiny_llama(tmp_path_factory.mktemp("base") / "own", **WIDE)


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: str(adapters.make(folder / name, base, seed=i)) for i, name in enumerate("xy")}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def load(base: Path, place: Path | None, **options: Any) -> LLM:
    kept = {} if place is None else {"prefix_cache_dir": str(place)}
    return LLM(str(base), **{"draft": "none", "cache_memory": POOL, **kept, **options})


def disk(llm: LLM) -> DiskPages:
    assert llm.runner.disk is not None
    return llm.runner.disk


def run(engine: Engine, *requests: Request) -> list[Received]:
    received = {request.id: Received(request.params.n) for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for event in checked(engine.step()):
            received[event.request.id].take([event])
        engine.memory.check()
    return list(received.values())


def leave(llm: LLM, *requests: Request) -> list[Received]:
    """Runs the requests and waits until their pages are written."""
    found = run(llm.engine, *requests)
    assert disk(llm).flush()
    return found


def prompt(llm: LLM, tokens: int = 100, text: str = TEXT) -> list[int]:
    return (llm.tokenizer.encode(text) * (tokens // 10))[:tokens]


def bits(llm: LLM) -> dict[bytes, int]:
    """The checksum of each published page, by its name on disk."""
    nodes, store = llm.runner.table.prefix.nodes, llm.runner.memory.paged.store
    return {disk(llm)._name(node): store.sums(Space(), np.array([page], np.int32))[0] for page, node in nodes.items()}


def params(**given: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.9, "seed": 3, "max_tokens": 24, "ignore_eos": True, "logprobs": 2, **given})


# ---- the same text


@pytest.mark.parametrize(("backend", "dtype"), [("native", "bfloat16"), ("native", "float32"), ("numpy", "float32")])
def test_a_text_from_disk_is_the_text_that_is_computed(base: Path, made: dict[str, str], place: Path, backend: str, dtype: str) -> None:
    """For the model and two adapters, together, each with its own pages."""
    options: dict[str, Any] = {"backend": backend, "dtype": dtype, "lora": made}

    def requests(llm: LLM) -> list[Request]:
        return [Request(f"{name}", prompt(llm), params(lora=name)) for name in (None, "x", "y")]

    plain = load(base, None, **options)
    expected = [run(plain.engine, one)[0] for one in requests(plain)]
    first = load(base, place, **options)
    for got, want in zip(leave(first, *requests(first)), expected, strict=True):
        assert (got.tokens, got.logprobs) == (want.tokens, want.logprobs)
    assert disk(first).written == 3 * (123 // PAGE) and disk(first).dropped == 0
    again = load(base, place, **options, token_budget=13, max_seqs=8)
    asked = requests(again)
    for request, got, want in zip(asked, run(again.engine, *asked), expected, strict=True):
        assert (got.tokens, got.logprobs) == (want.tokens, want.logprobs)
        assert (request.cached_tokens, request.disk_tokens) == (96, 96) and request.disk_seconds > 0
    assert disk(again).found == 9 and disk(again).written == 0
    assert bits(again) == bits(first)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_pages_of_pytorch(base: Path, place: Path, dtype: str) -> None:
    """Its backend does not promise bits of texts; those of pages come back."""
    first = load(base, place, backend="torch", dtype=dtype)
    want = leave(first, Request("r", prompt(first), params()))[0]
    again = load(base, place, backend="torch", dtype=dtype)
    got = run(again.engine, request := Request("r", prompt(again), params()))[0]
    assert (request.disk_tokens, disk(again).found) == (96, 3)
    assert dtype == "bfloat16" or got.tokens == want.tokens
    assert bits(again) == bits(first) and len(bits(first)) == 3


CASES = {
    "drafts": params(draft="token-recycling"),
    "greedy": params(temperature=0),
    "n": params(n=3),
    "prompt logprobs": params(prompt_logprobs=1),
    "eviction": params(keep="streaming-llm:sinks=2,recent=30"),
    "heads": params(keep="snapkv:budget=48,window=8"),
    "sparse": params(read="page-top-k:tokens=64,sinks=0"),
    "depth": params(depth="layer-skip:speedup=1.5"),
}


@pytest.mark.parametrize("case", CASES)
def test_methods_of_requests(base: Path, place: Path, case: str) -> None:
    plain, first = load(base, None), load(base, place)
    leave(first, Request("plain", prompt(first), params()))
    want = run(plain.engine, Request("r", prompt(plain), CASES[case]))[0]
    again = load(base, place)
    got = run(again.engine, request := Request("r", prompt(again), CASES[case]))[0]
    assert (got.tokens, got.logprobs) == (want.tokens, want.logprobs)
    assert (request.disk_tokens > 0) == (case not in ("prompt logprobs", "sparse"))


def test_preempted_texts_come_back_from_disk(base: Path, place: Path) -> None:
    """A small pool: pages of texts that were preempted leave memory, and are read again."""
    plain = load(base, None, cache_memory=1 << 23)
    given = [(prompt(plain, 90, f"{i} {TEXT}"), params(seed=i, max_tokens=60)) for i in range(6)]
    expected = [run(plain.engine, Request(str(i), *one))[0].tokens for i, one in enumerate(given)]
    block = plain.runner.memory.paged.store.block_bytes
    small = load(base, place, cache_memory=14 * block, max_model_len=200)
    for turn in range(2):
        found = leave(small, *(Request(f"{turn} {i}", *one) for i, one in enumerate(given)))
        assert [one.tokens for one in found] == expected
    assert small.engine.preemptions and disk(small).found > 0


def test_two_requests_of_one_prompt_read_it_once(base: Path, place: Path) -> None:
    first = load(base, place)
    leave(first, Request("r", prompt(first), params()))
    again = load(base, place)
    asked = [Request(str(i), prompt(again, 100 + i), params()) for i in range(3)]
    run(again.engine, *asked)
    assert disk(again).found == 3 and [one.cached_tokens for one in asked] == [96] * 3
    assert [one.disk_tokens for one in asked] == [96, 0, 0]


def test_memory_and_disk_each_have_a_part(base: Path, place: Path) -> None:
    first = load(base, place)
    leave(first, Request("r", prompt(first, 200), params()))
    again = load(base, place)
    run(again.engine, Request("a", prompt(again, 70), params(max_tokens=1)))
    run(again.engine, request := Request("b", prompt(again, 200), params()))
    assert (request.cached_tokens, request.disk_tokens) == (192, 128)


def test_an_edit_takes_over_a_text_on_disk(base: Path, place: Path) -> None:
    old, patch = TEXT * 3, Patch(4, 7, "dog")
    first = load(base, place)
    want = [first.generate(old, temperature=0, max_tokens=4), first.edit(old, patch, temperature=0, max_tokens=12)][1][0]
    assert want.reused_tokens > 0 and disk(first).flush()
    again = load(base, place)
    got = again.edit(old, patch, temperature=0, max_tokens=12)[0]
    assert (got.reused_tokens, got.outputs[0].token_ids) == (want.reused_tokens, want.outputs[0].token_ids)
    assert disk(again).found > 0
    again.runner.memory.check()


@pytest.mark.parametrize("seed", range(2))
def test_any_order_of_arrivals_aborts_and_evictions(base: Path, made: dict[str, str], place: Path, seed: int) -> None:
    """In a small pool, where pages leave memory and come back from disk, each text is the one that its request gets alone."""
    dice = random.Random(seed)
    plain = load(base, None, lora=made)
    given: list[tuple[list[int], SamplingParams, str]] = []
    for i in range(8):
        tokens = (prompt(plain, dice.choice([40, 70, 130]), TEXT) + prompt(plain, 40, f"{i % 3} {TEXT}"))[: dice.randint(34, 150)]
        own = params(seed=i, max_tokens=dice.randint(1, 40), lora=dice.choice([None, None, "x"]), n=dice.choice([1, 1, 2]))
        given.append((tokens, own, dice.choice(["", "", "tenant"])))
    expected = [run(plain.engine, Request("r", *one))[0].tokens for one in given]
    llm = load(base, place, lora=made, cache_memory=18 * plain.runner.memory.paged.store.block_bytes, max_model_len=200)
    engine, running, found = llm.engine, {}, 0
    for turn in range(60):
        which = dice.randrange(len(given))
        tokens, own, salt = given[which]
        request = Request(f"{turn}", list(tokens), own, salt, priority=dice.randint(0, 1))
        engine.add(request)
        running[request.id] = which, Received(own.n)
        for _ in range(dice.randint(0, 8)):
            if engine.has_work:
                for event in checked(engine.step()):
                    running[event.request.id][1].take([event])
                engine.memory.check()
        if dice.random() < 0.15:
            gone = dice.choice(list(running))
            engine.abort(gone)
            del running[gone]
        if dice.random() < 0.2:
            assert disk(llm).flush()
            engine.table.forget()
    while engine.has_work:
        for event in checked(engine.step()):
            running[event.request.id][1].take([event])
        engine.memory.check()
    for which, received in running.values():
        assert received.tokens == expected[which]
        found += all(received.ended)
    assert found == len(running) > 30 and disk(llm).found > 20 and engine.preemptions


# ---- whose pages they are


def test_no_tenant_finds_pages_of_another(base: Path, place: Path) -> None:
    first = load(base, place)
    leave(first, *(Request(salt, prompt(first), params(), salt) for salt in ("one", "two", "")))
    assert disk(first).written == 9
    again = load(base, place)
    found = {}
    for salt in ("three", "one", "", "\udc80", "one\0"):
        run(again.engine, request := Request(salt, prompt(again), params(), salt))
        found[salt] = request.cached_tokens
    assert found == {"three": 0, "one": 96, "": 96, "\udc80": 0, "one\0": 0}


def test_names_say_nothing_about_texts_or_tenants(base: Path, tmp_path: Path) -> None:
    """The same text of the same tenant has other names in another folder."""
    seen = []
    for name in ("a", "b"):
        llm = load(base, tmp_path / name)
        leave(llm, Request("r", prompt(llm), params(), "tenant"))
        seen.append({one.link.name for one in files._entries(disk(llm).files.place)})
        assert b"tenant" not in b"".join(path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file())
    assert len(seen[0]) == 3 and not seen[0] & seen[1]


def test_other_models_find_nothing(base: Path, place: Path, tmp_path: Path) -> None:
    """One number of one weight differs, or the dtype, or the form of the weights, or the backend."""
    first = load(base, place)
    leave(first, Request("r", prompt(first), params()))
    other = checkpoints.tiny_llama(tmp_path / "other", **WIDE)
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][5, 7] += 1
    save_file(tensors, other / "model.safetensors")
    dtype = "bfloat16" if str(first.backend.dtype) == "float32" else "float32"
    for llm in (load(other, place), load(base, place, dtype=dtype), load(base, place, quant="int8"), load(base, place, backend="numpy")):
        run(llm.engine, request := Request("r", prompt(llm), params()))
        assert request.cached_tokens == 0
    run(load(base, place).engine, request := Request("r", prompt(first), params()))
    assert request.cached_tokens == 96


def test_an_adapter_under_the_name_of_another_finds_nothing(base: Path, made: dict[str, str], place: Path) -> None:
    first = load(base, place, lora={"own": made["x"]})
    leave(first, Request("r", prompt(first), params(lora="own")))
    for name, cached in (("y", 0), ("x", 96)):
        again = load(base, place, lora={"own": made[name]})
        run(again.engine, request := Request("r", prompt(again), params(lora="own")))
        assert request.cached_tokens == cached


# ---- faults


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


FAULTS: dict[str, Callable[[Path], None]] = {
    "damaged": damaged,
    "cut": lambda path: os.truncate(path, 100),
    "gone": lambda path: path.unlink(),
    "foreign": lambda path: path.chmod(0o644),
}


@pytest.mark.parametrize("page", [0, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_pages_before_a_bad_one_are_used(
    base: Path, place: Path, fault: str, page: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(base, place)
    want = leave(first, Request("r", prompt(first), params()))[0]
    again = load(base, place)
    found = disk(again).find(prompt(again), "", [])
    FAULTS[fault](Path(disk(again).files._path(found.links[page])))
    if fault == "gone":  # after it was found
        monkeypatch.setattr(disk(again).files, "has", lambda link: True)
    with caplog.at_level(logging.WARNING):
        got = run(again.engine, request := Request("r", prompt(again), params()))[0]
    assert (got.tokens, got.logprobs) == (want.tokens, want.logprobs)
    assert request.cached_tokens == request.disk_tokens == page * PAGE
    assert len(caplog.records) == (fault != "gone")
    monkeypatch.undo()
    assert disk(again).flush() and disk(again).written == 1  # it is written anew
    run(load(base, place).engine, request := Request("r", prompt(again), params()))
    assert request.cached_tokens == 96


def test_a_full_disk_is_one_line_and_texts_go_on(base: Path, place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    llm = load(base, place)

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_write", full)
    with caplog.at_level(logging.WARNING):
        for i in range(4):
            leave(llm, Request(str(i), prompt(llm, 100 + 3 * i, f"{i} {TEXT}"), params()))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"{place}: no pages are written for 30 s: No space left on device"
    assert disk(llm).written == 0 and disk(llm).dropped >= 12
    monkeypatch.undo()
    monkeypatch.setattr(pages, "REST", 0.0)
    leave(llm, Request("again", prompt(llm, 100, f"again {TEXT}"), params()))
    assert disk(llm).written >= 3


def test_the_queue_is_bounded_and_evicted_pages_are_not_written(base: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load(base, place)
    kept = disk(llm)
    nodes: list[Any] = []
    llm.runner.table.listener = nodes.extend
    run(llm.engine, Request("r", prompt(llm), params()))
    llm.runner.table.forget()
    kept.listed(nodes)
    assert kept.flush() and (kept.written, kept.dropped) == (0, 3)
    monkeypatch.setattr(pages, "MOST_QUEUED", 0)
    kept.listed(nodes)
    assert (kept.written, kept.dropped) == (0, 6)


def test_a_page_that_is_evicted_while_it_is_copied_is_not_written(base: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load(base, place)
    kept, read = disk(llm), disk(llm).store.read

    def late(*given: Any) -> Any:
        found = read(*given)
        llm.runner.table.forget()
        return found

    nodes: list[Any] = []
    llm.runner.table.listener = nodes.extend
    run(llm.engine, Request("r", prompt(llm), params()))
    monkeypatch.setattr(kept.store, "read", late)
    kept.take(nodes)
    assert (kept.written, kept.dropped) == (0, 3)


def test_a_text_that_is_longer_than_the_room_is_not_written(base: Path, place: Path) -> None:
    size = disk(load(base, place)).files.file_size
    llm = load(base, place, prefix_cache_size=4 * size + 10)
    leave(llm, Request("r", prompt(llm, 250), params(max_tokens=1)))
    assert disk(llm).written == 4 and disk(llm).dropped == 3
    run(load(base, place).engine, request := Request("r", prompt(llm, 250), params()))
    assert request.cached_tokens == 4 * PAGE


def test_forgetting_is_forgetting_on_disk_too(base: Path, place: Path) -> None:
    llm = load(base, place)
    run(llm.engine, Request("r", prompt(llm), params()))
    assert llm.engine.forget_prefixes() == 3
    run(load(base, place).engine, request := Request("r", prompt(llm), params()))
    assert request.cached_tokens == 0


# ---- settings


def test_what_is_wrong_with_folder_and_size_is_said(base: Path, place: Path) -> None:
    place.mkdir(mode=0o755)
    for given, message in (
        ({}, f"CacheConfig.prefix_cache_dir = {str(place)!r}: others may enter the folder; chmod 700 closes it"),
        ({"prefix_cache_size": 1000}, "CacheConfig.prefix_cache_size = 1000: must be at least"),
    ):
        with pytest.raises(InvalidInput) as error:
            load(base, place, **given)
        assert str(error.value).startswith(message)
        place.chmod(0o700)
    for wrong in ({"prefix_cache_size": "4GB"}, {"prefix_cache_dir": str(place), "prefix_sharing": False}, {"prefix_cache_dir": ""}):
        with pytest.raises(InvalidInput, match="prefix_cache_dir"):
            EngineConfig.of(**wrong)


def test_without_a_folder_nothing_listens(base: Path) -> None:
    llm = load(base, None)
    assert llm.runner.disk is None and llm.runner.table.listener is None


def test_an_engine_that_is_gone_leaves_no_thread(base: Path, place: Path) -> None:
    llm = load(base, place)
    mine = [one for one in threading.enumerate() if one.name == "redraft-disk"]
    del llm
    gc.collect()
    for one in mine:
        one.join(10)
    assert mine and not any(one.is_alive() for one in mine)
