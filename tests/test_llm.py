"""`LLM` as users call it: lists and single prompts, streams, bad input, Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redraft import LLM, Patch, SamplingParams, registry
from redraft.bench import compare
from redraft.bench.compare import PromptGroup
from redraft.bench.prompts import Prompt
from redraft.config import EngineConfig
from redraft.engine.interrupt import InterruptBetween
from redraft.errors import CheckpointError, InvalidInput, OutOfMemory, PromptTooLong, RedraftError, UnknownMethod, Unsupported
from redraft.ops import library
from tests import adapters
from tests.checkpoints import tiny_llama
from tests.contracts.identity import complete

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, max_tokens=25, seed=3, ignore_eos=True)
PROMPTS = ["def f(x):", "a b a b a b", "once upon a time there was a café"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llm") / "llama")


@pytest.fixture(scope="module")
def loaded(path: Path) -> LLM:
    return LLM(str(path), dtype="float64", draft="token-recycling", draft_model=str(path), threads=1, cache_memory=1 << 22)


@pytest.fixture
def llm(loaded: LLM) -> Iterator[LLM]:
    yield loaded
    loaded.engine.memory.check()
    assert loaded.engine.memory.used() == 0 and not loaded.engine.has_work and not loaded.engine.outputs


def texts(llm: LLM, prompts: Any = PROMPTS, params: Any = SAMPLED) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def one_line(error: BaseException) -> bool:
    return bool(str(error)) and "\n" not in str(error)


# ---- use


def test_every_drafter_gives_the_plain_text(llm: LLM) -> None:
    plain = texts(llm.sibling(draft="none"))
    assert len({tuple(text) for text in plain}) == 3
    for draft in (name for name in registry.METHODS["draft"] if complete("draft", name)):
        assert texts(llm.sibling(draft=draft)) == plain
    for prompt, text in zip(PROMPTS, plain, strict=True):
        assert texts(llm, prompt) == [text]


def test_a_call_may_have_another_scheduler(llm: LLM) -> None:
    plain, own = texts(llm), llm.engine.scheduler
    for scheduler in registry.METHODS["sched"]:
        outputs = llm.generate(PROMPTS, SAMPLED, scheduler=scheduler)
        assert [output.prompt for output in outputs] == PROMPTS and [output.outputs[0].token_ids for output in outputs] == plain
        assert llm.engine.scheduler is own
    with pytest.raises(UnknownMethod, match="no sched method 'sarath': did you mean 'sarathi'"):
        llm.generate(PROMPTS, SAMPLED, scheduler="sarath")
    with pytest.raises(InvalidInput, match="scheduler = 3: the name of a scheduler is needed"):
        llm.generate(PROMPTS, SAMPLED, scheduler=3)  # type: ignore[arg-type]
    stream = llm.stream(PROMPTS, SAMPLED)
    next(stream)
    with pytest.raises(Unsupported, match="scheduler = 'fcfs': other requests are under way"):
        llm.generate(PROMPTS, SAMPLED, scheduler="fcfs")
    stream.close()
    with pytest.raises(PromptTooLong):
        llm.generate([1] * 2000, SAMPLED, scheduler="fcfs")
    assert llm.engine.scheduler is own


def test_a_prediction_is_a_hint_and_changes_no_text(llm: LLM) -> None:
    plain = texts(llm)
    for draft in (name for name in registry.METHODS["draft"] if complete("draft", name)):
        own = llm.sibling(draft=draft)
        for prediction in ["a b a b", (1, 2, 3), (), ""] if draft in ("none", "copyspec", "auto") else ["a b a b"]:
            assert texts(own, params=SAMPLED.but(prediction=prediction)) == plain


def test_a_stream_joins_to_what_generate_gives(llm: LLM) -> None:
    whole = llm.generate(PROMPTS, SAMPLED.but(n=2))
    joined: dict[tuple[int, int], tuple[str, list[int], str | None]] = {}
    for delta in llm.stream(PROMPTS, SAMPLED.but(n=2)):
        text, tokens, _ = joined.get((delta.prompt, delta.index), ("", [], None))
        joined[delta.prompt, delta.index] = text + delta.text, tokens + delta.token_ids, delta.finish_reason
    for i, output in enumerate(whole):
        for one in output.outputs:
            assert joined[i, one.index] == (one.text, one.token_ids, one.finish_reason)
            assert one.text == llm.tokenizer.decode(one.token_ids)
            assert len(one.drafted) == len(one.token_ids) == one.stats.steps + one.stats.accepted


def test_a_text_and_its_pieces_have_the_provenance_that_was_requested(llm: LLM) -> None:
    params = GREEDY.but(provenance=True, draft="token-recycling")
    (whole,) = llm.generate(PROMPTS[1], params)[0].outputs
    pieces = list(llm.stream(PROMPTS[1], params))
    for sources, drafted in [(whole.provenance, whole.drafted), *((piece.provenance, piece.drafted) for piece in pieces)]:
        assert [bool(source.drafter) for source in sources] == drafted
    assert not any(delta.provenance for delta in llm.stream(PROMPTS[1], GREEDY))


def test_closing_a_stream_frees_what_it_held(llm: LLM) -> None:
    stream = llm.stream(PROMPTS, SAMPLED)
    next(iter(stream))
    assert llm.engine.memory.used()
    stream.close()  # type: ignore[attr-defined]


def test_a_seed_is_chosen_and_reported(llm: LLM) -> None:
    first = llm.generate(PROMPTS[0], SAMPLED.but(seed=None))[0]
    assert first.seed is not None
    assert texts(llm, PROMPTS[0], SAMPLED.but(seed=first.seed)) == [first.outputs[0].token_ids]


def test_params_for_each_prompt(llm: LLM) -> None:
    found = llm.generate(PROMPTS, [GREEDY.but(max_tokens=n) for n in (1, 2, 3)])
    assert [len(output.outputs[0].token_ids) for output in found] == [1, 2, 3]
    with pytest.raises(InvalidInput, match="3 prompts but 2 sampling params"):
        llm.generate(PROMPTS, [GREEDY, GREEDY])


def test_what_is_no_sampling_params_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(InvalidInput, match=r"sampling_params\[1\] is a dict"):
        llm.generate(PROMPTS, [GREEDY, {"temperature": 0}, GREEDY])  # type: ignore[list-item]
    assert not llm.engine.has_work


def test_cached_tokens_and_logprobs_are_reported(llm: LLM) -> None:
    prompt = {"prompt_token_ids": list(range(3, 80))}
    llm.generate(prompt, GREEDY)
    again = llm.generate(prompt, GREEDY.but(logprobs=2))[0]
    assert again.cached_tokens == 64
    assert again.outputs[0].logprobs is not None and len(again.outputs[0].logprobs) == 12
    assert all(entry.rank == 1 for entry in again.outputs[0].logprobs)
    whole = llm.generate(prompt, GREEDY.but(prompt_logprobs=1))[0]
    assert whole.prompt_logprobs is not None and len(whole.prompt_logprobs) == 77 and whole.prompt_logprobs[0] is None


# ---- bad input

BAD: dict[str, tuple[Any, type[RedraftError], str]] = {
    "empty text": ("", InvalidInput, "prompt is empty"),
    "no tokens": ({"prompt_token_ids": []}, InvalidInput, "prompt is empty"),
    "id beyond the vocabulary": ({"prompt_token_ids": [5, 259]}, InvalidInput, r"prompt_token_ids\[1\] = 259.*0\.\.258"),
    "negative id": ({"prompt_token_ids": [-1]}, InvalidInput, r"prompt_token_ids\[0\] = -1"),
    "id that is no integer": ({"prompt_token_ids": [1, "a"]}, InvalidInput, r"prompt_token_ids\[1\] = 'a'"),
    "too long": ({"prompt_token_ids": [5] * 256}, PromptTooLong, "prompt has 256 tokens: max_model_len = 256"),
    "another key": ({"tokens": [1]}, InvalidInput, "prompt_token_ids"),
    "no prompt at all": (17, InvalidInput, "int"),
    "nothing": (None, InvalidInput, "NoneType"),
    "ids that are no list": ({"prompt_token_ids": None}, InvalidInput, "prompt_token_ids"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_prompt_alone_raises_one_line(llm: LLM, name: str) -> None:
    prompt, kind, message = BAD[name]
    if not isinstance(prompt, (str, dict)):
        return  # alone, generate takes it for a list
    with pytest.raises(kind, match=message) as refused:
        llm.generate(prompt, GREEDY)
    assert one_line(refused.value)


def test_in_a_list_the_bad_ones_tell_their_error_and_the_rest_finish(llm: LLM) -> None:
    bad = [prompt for prompt, _, _ in BAD.values()]
    found = llm.generate([PROMPTS[0], *bad, PROMPTS[1]], SAMPLED)
    assert [found[0].outputs[0].token_ids, found[-1].outputs[0].token_ids] == texts(llm, PROMPTS[:2])
    for output, (_, _, message) in zip(found[1:-1], BAD.values(), strict=True):
        assert output.error is not None and "\n" not in output.error and not output.outputs and output.finished
        assert re.search(message, output.error)
    reported = {delta.prompt: delta for delta in llm.stream([PROMPTS[0], "", PROMPTS[1]], GREEDY) if delta.error}
    assert list(reported) == [1] and reported[1].finish_reason == "error"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "SamplingParams.temperature = -0.1"),
        ({"temperature": float("nan")}, "SamplingParams.temperature"),
        ({"top_p": -0.1}, "SamplingParams.top_p = -0.1"),
        ({"max_tokens": 0}, "SamplingParams.max_tokens = 0"),
        ({"temprature": 1}, "unknown option 'temprature' of SamplingParams: did you mean 'temperature'"),
        ({"stop": ("",)}, "empty string"),
        ({"n": 0}, "SamplingParams.n = 0"),
        ({"seed": -1}, "SamplingParams.seed = -1"),
    ],
)
def test_bad_sampling_params(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as refused:
        SamplingParams(**fields)
    assert one_line(refused.value)


@pytest.mark.parametrize("fields", [{"logit_bias": {999: 1.0}}, {"stop_token_ids": (999,)}, {"prediction": (3, 999)}])
def test_params_that_do_not_fit_the_vocabulary(llm: LLM, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="999") as refused:
        llm.generate(PROMPTS[0], GREEDY.but(**fields))
    assert one_line(refused.value)
    bad, good = llm.generate(PROMPTS[:2], [GREEDY.but(**fields), GREEDY])
    assert bad.error and not good.error


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"drft": "none"}, InvalidInput, "unknown option 'drft'.*'draft'"),
        ({"draft": "copyspecc"}, UnknownMethod, "no draft method 'copyspecc': did you mean 'copyspec'"),
        ({"draft": "copyspec:gama=2"}, UnknownMethod, "unknown option 'gama' of copyspec; allowed: gamma"),
        ({"draft": "copyspec:gamma=x"}, InvalidInput, "copyspec:gamma=x"),
        ({"verify": "hope"}, UnknownMethod, "no verify method 'hope'"),
        ({"scheduler": "lifo"}, UnknownMethod, "no sched method 'lifo'"),
        ({"backend": "cuda"}, UnknownMethod, "no backend 'cuda'"),
        ({"device": "tpu"}, InvalidInput, "device = 'tpu'"),
        ({"dtype": "int8"}, InvalidInput, "ModelConfig.dtype = 'int8'"),
        ({"max_model_len": 257}, InvalidInput, "max_model_len = 257.*256"),
        ({"token_budget": 3, "max_seqs": 4}, InvalidInput, "token_budget = 3"),
        ({"cache_memory": 50_000}, OutOfMemory, "cannot hold one sequence of max_model_len = 256"),
        ({"cache_memory": 1 << 50}, OutOfMemory, "does not fit"),
    ],
)
def test_bad_options_are_refused_at_loading(path: Path, options: dict[str, Any], kind: type[RedraftError], message: str) -> None:
    with pytest.raises(kind, match=message) as refused:
        LLM(str(path), **{"dtype": "float32", **options})
    assert one_line(refused.value)


def test_a_config_and_options_together_are_refused(path: Path) -> None:
    with pytest.raises(InvalidInput, match="either a config or options"):
        LLM(str(path), config=EngineConfig())


def test_missing_and_corrupt_checkpoints(path: Path, tmp_path: Path) -> None:
    with pytest.raises(RedraftError) as missing:
        LLM(str(tmp_path / "nowhere"))
    assert one_line(missing.value) and "nowhere" in str(missing.value)

    def broken(name: str, spoil: Any) -> None:
        folder = tmp_path / name
        folder.mkdir()
        for file in path.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        spoil(folder)
        with pytest.raises(CheckpointError) as refused:
            LLM(str(folder), dtype="float32")
        assert one_line(refused.value) and name in str(refused.value)

    broken("truncated", lambda folder: os.truncate(folder / "model.safetensors", 5000))
    broken("garbage", lambda folder: (folder / "model.safetensors").write_bytes(b"garbage" * 100))
    broken("config", lambda folder: (folder / "config.json").write_text("{"))
    broken("weightless", lambda folder: (folder / "model.safetensors").unlink())
    broken("wordless", lambda folder: [file.unlink() for file in folder.glob("tokenizer*")])


# ---- errors within a step


def test_in_a_list_a_text_of_no_numbers_tells_so_and_the_rest_finish(path: Path, tmp_path: Path) -> None:
    llm = LLM(str(path), dtype="float32", draft="none", cache_memory=1 << 22, lora={"x": adapters.make(tmp_path / "x", path, size=1e30)})
    truth, params = texts(llm), [SAMPLED, SAMPLED.but(lora="x"), SAMPLED]
    first, broken, last = llm.generate(PROMPTS, params)
    assert (
        broken.outputs == []
        and broken.finished
        and re.fullmatch(r"the model's output after token \d+ is NaN or infinite", broken.error or "")
    )
    assert [one.outputs[0].token_ids for one in (first, last)] == truth[::2]
    streamed: list[list[int]] = [[], [], []]
    reasons = {}
    for delta in llm.stream(PROMPTS, params):
        streamed[delta.prompt] += delta.token_ids
        reasons[delta.prompt] = delta.finish_reason, delta.error
    assert streamed == [truth[0], [], truth[2]] and reasons[1] == ("error", broken.error)
    with pytest.raises(RedraftError, match="NaN or infinite"):
        llm.generate(PROMPTS[1], params[1])
    with pytest.raises(RedraftError, match="NaN or infinite"):
        compare.generate(llm, PromptGroup("x", 0, tuple(Prompt(one, "x", prompt=one) for one in PROMPTS), tuple(params)))
    assert llm.engine.memory.used() == 0 and not llm.engine.has_work


class Bang(Exception):
    pass


@pytest.mark.parametrize("error", [Bang, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["forward", "propose", "observe"])
def test_an_error_in_mid_step_leaves_a_usable_engine(
    llm: LLM, place: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = texts(llm)
    owner: Any = llm.runner if place == "forward" else llm.engine.drafter
    right, calls = getattr(owner, place), 0

    def wrong(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3 or (calls > 3 and error is Bang):  # an Exception that passes ends no request
            raise error
        return right(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, wrong)
        with pytest.raises(error):
            llm.generate(PROMPTS, SAMPLED)
    llm.engine.memory.check()
    assert llm.engine.memory.used() == 0 and not llm.engine.has_work
    assert texts(llm) == truth


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("place", ["forward", "observe"])
def test_ctrl_c_waits_for_the_steps_end(llm: LLM, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = texts(llm)
    owner: Any = llm.runner if place == "forward" else llm.engine.drafter
    right, calls, reported = getattr(owner, place), 0, 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            os.kill(os.getpid(), signal.SIGINT)  # a real one
        return right(*args)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, interrupted)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            for delta in llm.stream(PROMPTS, SAMPLED):
                reported += len(delta.token_ids)
    assert calls == 4 and reported >= 6, "the steps before were reported"
    assert signal.getsignal(signal.SIGINT) is handler
    llm.engine.memory.check()
    assert llm.engine.memory.used() == 0
    assert texts(llm) == truth


def test_generate_works_in_another_thread(llm: LLM) -> None:
    truth, found = texts(llm), []
    thread = threading.Thread(target=lambda: found.append(texts(llm)))
    thread.start()
    thread.join(60)
    assert found == [truth]


@pytest.mark.torch
def test_threads_option(path: Path) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        LLM(str(path), dtype="float32", threads=1, cache_memory=1 << 22)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# ---- several users of one engine


def test_two_callers_of_one_llm_both_get_all_of_their_text(llm: LLM) -> None:
    """A generate inside the loop over a stream, and two streams at once. No events of other callers are lost."""
    truth = texts(llm)
    inside, found = [], []
    for delta in llm.stream(PROMPTS[0], SAMPLED):
        found += delta.token_ids
        if not inside:
            inside = texts(llm, PROMPTS[1])
    assert [found, inside[0]] == truth[:2]
    one, other = llm.stream(PROMPTS[0], SAMPLED), llm.stream(PROMPTS[2], SAMPLED)
    pairs: tuple[list[int], list[int]] = ([], [])
    for stream, text in ((one, pairs[0]), (other, pairs[1]), (one, pairs[0])):
        text += next(stream).token_ids
    for stream, text in ((other, pairs[1]), (one, pairs[0])):
        for delta in stream:
            text += delta.token_ids
    assert list(pairs) == [truth[0], truth[2]]


def test_a_stream_that_nobody_reads_is_aborted(llm: LLM) -> None:
    stream = llm.stream(PROMPTS, GREEDY)
    assert llm.engine.has_work
    stream.close()
    assert not llm.engine.has_work
    llm.stream(PROMPTS, GREEDY)  # dropped at once
    assert not llm.engine.has_work


def test_an_abort_from_outside_ends_a_stream(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], GREEDY)
    next(stream)
    (seq,) = llm.engine.running
    assert llm.engine.abort(seq.request.id)
    assert list(stream) == []


def test_changed_params_keep_what_was_left_to_the_checkpoint() -> None:
    assert SamplingParams(top_k=3).but(max_tokens=5).model_fields_set == {"top_k", "max_tokens"}


def test_numpy_token_ids_are_token_ids(llm: LLM) -> None:
    ids = np.array([5, 6, 7])
    assert texts(llm, {"prompt_token_ids": ids}) == texts(llm, {"prompt_token_ids": ids.tolist()})


def test_a_sibling_shares_what_was_loaded(llm: LLM) -> None:
    with pytest.raises(InvalidInput, match="sibling: dtype cannot differ"):
        llm.sibling(dtype="float32")


@pytest.mark.parametrize("before", ["own", "ignored"])
def test_sigint_goes_where_the_caller_wants_it(before: str) -> None:
    hits: list[int] = []
    old = signal.signal(signal.SIGINT, signal.SIG_IGN if before == "ignored" else lambda number, frame: hits.append(number))
    try:
        with InterruptBetween():
            assert (signal.getsignal(signal.SIGINT) is signal.SIG_IGN) == (before == "ignored")  # only this is inherited by child processes
            signal.raise_signal(signal.SIGINT)
            assert hits == []  # not within
    finally:
        signal.signal(signal.SIGINT, old)
    assert hits == ([] if before == "ignored" else [signal.SIGINT])


# ---- edits, misses, policies


def test_an_edit_keeps_the_cache_of_what_was_not_edited() -> None:
    llm = LLM("embedded", dtype="float64")
    text = "import os\n\n\ndef size(path):\n    return os.stat(path).st_size\n\n\n" * 6
    params = SamplingParams(temperature=0, max_tokens=8)
    before = llm.generate(text, params)[0]
    at = text.index("def size", 100)
    after = llm.edit(text, Patch(at, at + len("def size"), "def bytes_of"), params)[0]
    assert after.prompt_token_ids == llm.tokenizer.encode(text[:at] + "def bytes_of" + text[at + len("def size") :])
    assert after.guarantee == "lossy" and before.guarantee == "same-text"
    computed = len(after.prompt_token_ids) - after.cached_tokens - after.reused_tokens
    assert after.cached_tokens and after.reused_tokens and computed < 48
    again = llm.edit(before, [Patch(0, 6, "from"), Patch(len(text), len(text), "x = 1\n")], params)[0]
    assert llm.tokenizer.decode(again.prompt_token_ids).startswith("from os")
    llm.engine.memory.check()
    assert llm.engine.memory.used() == 0


@pytest.mark.parametrize("patch", [Patch(5, 4, ""), Patch(-1, 2, "x"), Patch(0, 999, ""), [Patch(0, 5, "a"), Patch(3, 6, "b")]])
def test_patches_outside_of_the_text_are_refused(patch: Patch) -> None:
    with pytest.raises(InvalidInput, match="patch = "):
        LLM("embedded").edit("x = 1 + 2\n", patch)


def test_a_cache_miss_names_the_token_that_differs() -> None:
    llm = LLM("embedded", dtype="float32")
    text = "".join(f"name_{i} = {i}\n" for i in range(40))
    params = SamplingParams(temperature=0, max_tokens=2)
    first = llm.generate(text, params)[0]
    assert first.cache_miss is None
    changed = llm.generate(text.replace("name_9 ", "other_9 "), params)[0]
    miss = changed.cache_miss
    assert miss is not None
    at = next(i for i, (a, b) in enumerate(zip(first.prompt_token_ids, changed.prompt_token_ids, strict=False)) if a != b)
    assert (miss.at, miss.token, miss.cached_token) == (at, changed.prompt_token_ids[at], first.prompt_token_ids[at])
    assert miss.lost == len(first.prompt_token_ids) // 32 * 32 - changed.cached_tokens
    assert repr(miss.text) in str(miss) and f"token {at}" in str(miss)
    assert llm.generate(text, params)[0].cache_miss is None


def test_a_text_goes_on_beyond_the_trained_context() -> None:
    llm = LLM("embedded", dtype="float32", max_model_len=96)
    endless = SamplingParams(temperature=0.8, seed=1, max_tokens=300, ignore_eos=True, keep="streaming-llm:recent=60")
    (one,) = llm.generate("x = [", endless)
    assert len(one.outputs[0].token_ids) == 300
    assert len(llm.generate("x = [", endless.but(max_tokens=None))[0].outputs[0].token_ids) < 96
    assert llm.engine.memory.paged.table.peak <= 5


def test_what_the_pool_can_never_hold_is_refused() -> None:
    llm = LLM(
        "embedded",
        dtype="float32",
        prefix_sharing=False,
        cache_memory=33 * LLM("embedded", dtype="float32").runner.memory.paged.store.block_bytes,
    )
    with pytest.raises(InvalidInput, match="use fewer max_tokens, or give the pool more memory"):
        llm.generate("x = 1", SamplingParams(max_tokens=1000, read="page-top-k:tokens=128"))
    assert llm.generate("x = 1", SamplingParams(max_tokens=4, read="page-top-k:tokens=128"))[0].outputs[0].token_ids


def test_edits_of_edits_and_several_texts_of_one() -> None:
    llm = LLM("embedded", dtype="float64")
    text = "import os\n\n\ndef size(path):\n    return os.stat(path).st_size\n\n\n" * 6
    params = SamplingParams(temperature=0.8, seed=2, max_tokens=6, n=2)
    llm.generate(text, params)
    one = llm.edit(text, Patch(130, 134, "bytes_of"), params)[0]
    assert len(one.outputs) == 2 and one.prompt == text[:130] + "bytes_of" + text[134:]
    two = llm.edit(one, Patch(10, 10, "# new\n"), params)[0]
    assert two.prompt == text[:10] + "# new\n" + text[10:130] + "bytes_of" + text[134:] + one.outputs[0].text
    assert two.reused_tokens > 60
    llm.engine.memory.check()
    assert llm.engine.memory.used() == 0


@pytest.mark.parametrize(
    ("patch", "options"),
    [
        (Patch(0.5, 3, "a"), {}),  # type: ignore[arg-type]
        (Patch(0, 3, 3), {}),  # type: ignore[arg-type]
        ((0, 3, "a"), {}),
        ("abc", {}),
        (Patch(0, 1, ""), {"reuse": 3}),
        (Patch(0, 1, ""), {"reuse": "pi"}),
    ],
    ids=str,
)
def test_edit_names_what_is_wrong(patch: Any, options: dict[str, Any]) -> None:
    with pytest.raises((InvalidInput, UnknownMethod), match=r"patch\[0\] = |patch of type str|no reuse method|^reuse = 3"):
        LLM("embedded").edit("x = 1 + 2\n", patch, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "numpy", "dtype": "bfloat16"}, "same-text"),
        ({"backend": "numpy", "quant": "int8"}, "same-text, weights int8 (lossy)"),
        ({"backend": "torch", "dtype": "bfloat16"}, "same-text but for near-ties"),
        ({"backend": "torch", "dtype": "float64"}, "same-text"),
        ({"backend": "reference"}, "same-text"),
    ],
    ids=str,
)
def test_a_promise_is_what_the_backend_keeps(options: dict[str, Any], said: str) -> None:
    llm = LLM("embedded", cache_memory=1 << 22, max_model_len=64, **options)
    assert llm.promise(SamplingParams()) == said
    assert llm.promise(SamplingParams(keep="streaming-llm")) == said.replace("same-text but for near-ties", "lossy").replace(
        "same-text", "lossy"
    )


MISSING = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *more: None if name.partition(".")[0] == "torch" else find(name, *more)
"""
WITHOUT = """
from redraft import LLM

llm = LLM("embedded", quant="int8", device="cpu", threads=1)
for chosen in ({}, {"codec": "int8"}, {"codec": "int4"}, {"keep": "streaming-llm"}, {"read": "page-top-k"}, {"draft": "draft-model"}):
    found = llm.generate("import os\\n", max_tokens=12, temperature=0.7, seed=1, logprobs=1, **chosen)[0].outputs[0]
    print(found.token_ids, found.logprobs)
print([float(x) for x in llm.embed("def f(x):")[0]][:4], any(name.partition(".")[0] in ("torch", "transformers") for name in sys.modules))
"""


@pytest.mark.skipif(bool(library.why_not()), reason="no native kernels")
def test_the_native_path_needs_no_pytorch() -> None:
    """Drafts, policies, quantization, sampling and embeddings, as if it were not installed: the same numbers as with it."""
    alone = subprocess.run([sys.executable, "-c", MISSING + WITHOUT], capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr[-2000:]
    *same, last = alone.stdout.splitlines()
    assert len(same) == 6 and last.endswith("False")
    if find_spec("torch"):
        with_it = subprocess.run([sys.executable, "-c", "import sys, torch" + WITHOUT], capture_output=True, text=True, check=True)
        *others, _ = with_it.stdout.splitlines()
        assert same == others
