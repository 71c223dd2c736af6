"""What callers give to `LLM`: every form of a prompt, and a one-line error for everything else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redraft import LLM, EngineConfig, Patch, RequestOutput, SamplingParams, registry
from redraft.config import is_utf8
from redraft.errors import MAX_MESSAGE, InvalidInput, RedraftError, shown
from redraft.inputs import integer, vectors_of
from tests.checkpoints import tiny_llama

HALF = "\ud800"  # half of a surrogate pair
SHORT = {"temperature": 0, "max_tokens": 3, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tiny_llama(tmp_path_factory.mktemp("inputs") / "llama")
    return LLM(str(path), dtype="float32", threads=1, cache_memory=1 << 22)


@pytest.fixture
def llm(loaded: LLM) -> Iterator[LLM]:
    yield loaded
    loaded.engine.memory.check()
    assert loaded.engine.memory.used() == 0 and not loaded.engine.has_work and not loaded._inboxes


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def tensors(*values: Any) -> list[Any]:
    """Of PyTorch, where it is installed."""
    if find_spec("torch") is None:
        return []
    import torch

    return [torch.tensor(value) for value in values]


# ---- forms


def test_every_form_of_a_prompt(llm: LLM) -> None:
    ids = llm.tokenizer.encode("abc")
    truth = tokens(llm.generate("abc", **SHORT))
    forms = ["abc", ids, tuple(ids), np.array(ids), *tensors(ids), {"prompt": "abc"}, {"prompt_token_ids": ids}]
    forms += [{"prompt": "other", "prompt_token_ids": np.array(ids)}, {"prompt": "abc", "prompt_token_ids": None, "context": np.int64(2)}]
    for form in forms:
        assert tokens(llm.generate(form, **SHORT)) == truth
        assert tokens(llm.generate([form, form], **SHORT)) == truth * 2
        assert [token for delta in llm.stream(form, **SHORT) for token in delta.token_ids] == truth[0]
        assert np.array_equal(llm.embed(form), llm.embed([form]))
    assert tokens(llm.generate(np.array([ids, ids]), **SHORT)) == truth * 2
    assert tokens(llm.generate((form for form in ("abc", ids)), **SHORT)) == truth * 2
    assert llm.generate([]) == [] and llm.generate(prompts=[]) == [] and llm.embed([]) == [] and list(llm.stream([])) == []
    assert [output.prompt for output in llm.generate(["abc", ids, {"prompt": "abc"}], **SHORT)] == ["abc", None, "abc"]


def test_conversations_are_prompts_too(llm: LLM) -> None:
    truth = tokens(llm.chat(MESSAGES, **SHORT))
    assert tokens(llm.generate({"messages": MESSAGES}, **SHORT)) == truth
    assert tokens(llm.chat([MESSAGES, MESSAGES], SamplingParams(**SHORT))) == truth * 2
    good, bad, empty = llm.chat([MESSAGES, [{"role": "user"}], []], **SHORT)
    assert tokens([good]) == truth and "messages[0]" in str(bad.error) and "messages is empty" in str(empty.error)


def test_tools_are_described_to_the_model() -> None:
    llm = LLM("embedded", draft="none", cache_memory=1 << 26)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    (plain,), (shown,) = llm.chat(MESSAGES, **SHORT), llm.chat(MESSAGES, tools=tools, **SHORT)
    assert "weather" in llm.tokenizer.decode_all(shown.prompt_token_ids)
    assert "weather" not in llm.tokenizer.decode_all(plain.prompt_token_ids)
    assert shown.prompt_token_ids == llm.generate({"messages": MESSAGES, "tools": tools}, **SHORT)[0].prompt_token_ids
    for wrong in (3, [3], [{"type": "function"}], [{"function": {"name": 3}}]):
        with pytest.raises(InvalidInput, match="tools"):
            llm.chat(MESSAGES, tools=wrong, **SHORT)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="tools: only a conversation has them"):
        llm.generate({"prompt": "abc", "tools": tools}, **SHORT)


def test_keywords_are_fields_of_sampling_params(llm: LLM) -> None:
    truth = tokens(llm.generate("abc", SamplingParams(**SHORT)))
    assert tokens(llm.generate("abc", **SHORT)) == truth
    assert tokens(llm.edit("abd", Patch(2, 3, "c"), **SHORT)) == truth
    calls: list[Callable[..., Any]] = [llm.generate, llm.stream, lambda text, *rest, **own: llm.edit(text, Patch(0, 0, ""), *rest, **own)]
    for call in [*calls, lambda text, *rest, **own: llm.chat(MESSAGES, *rest, **own)]:
        with pytest.raises(InvalidInput, match="sampling_params and the keyword 'top_k' are both given"):
            call("abc", SamplingParams(), top_k=3)
        with pytest.raises(InvalidInput, match="unknown option 'temprature'"):
            call("abc", temprature=1)


def test_integers() -> None:
    assert {integer(one) for one in (3, np.int64(3), np.uint8(3), *tensors(3))} == {3}
    bad = [True, np.True_, 3.0, "3", np.array([3]), *tensors([3], [[3]], 3.5), None]
    assert [integer(one) for one in bad] == [None] * len(bad)


# ---- half of a surrogate pair


@pytest.mark.parametrize("field", ["stop", "bad_words", "prediction"])
def test_half_of_a_surrogate_pair_in_a_field(field: str) -> None:
    with pytest.raises(InvalidInput, match=rf"^SamplingParams.{field} = .*half of a surrogate pair") as refused:
        SamplingParams(**{field: HALF})
    assert is_utf8(str(refused.value))


def test_half_of_a_surrogate_pair_in_a_prompt_ends_that_prompt_alone(llm: LLM) -> None:
    assert is_utf8("\U0001f600") and not is_utf8(HALF)
    good, *bad = llm.generate(["abc", HALF, {"prompt": HALF}, {"messages": [{"role": "user", "content": HALF}]}], **SHORT)
    assert tokens([good]) == tokens(llm.generate("abc", **SHORT))
    assert [str(output.error).split()[0] for output in bad] == ["prompt", "prompt", "messages"]
    for call in (llm.generate, llm.embed, llm.stream, lambda text: llm.edit(text, []), lambda text: llm.edit("a", Patch(0, 0, text))):
        with pytest.raises(InvalidInput, match="half of a surrogate pair"):
            call(HALF)


def test_whatever_a_prompt_of_a_list_raises_is_its_error_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, encode = tokens(llm.generate("abc", **SHORT)), llm.tokenizer.encode

    def broken(text: str, **options: Any) -> list[int]:
        if text == "x":
            raise ZeroDivisionError("two\nlines")
        return encode(text, **options)

    monkeypatch.setattr(llm.tokenizer, "encode", broken)
    first, bad, last = llm.generate(["abc", "x", "abc"], **SHORT)
    assert tokens([first, last]) == truth * 2 and bad.error == "ZeroDivisionError: two lines"
    with pytest.raises(ZeroDivisionError):
        llm.generate("x", **SHORT)


# ---- anything else


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError


class Lines:
    def __repr__(self) -> str:
        return "a\nb" * 999


def test_an_error_is_bounded_whatever_it_quotes() -> None:
    error = InvalidInput(f"field = {'x' * 5000}: must be small")
    assert len(str(error)) <= MAX_MESSAGE and str(error).startswith("field = xxx") and str(error).endswith("xxx: must be small")
    whole = "y" * MAX_MESSAGE
    assert str(RedraftError(whole)) == whole
    with pytest.raises(InvalidInput) as caught:
        registry.create("draft", "z" * 5000)
    assert len(str(caught.value)) <= MAX_MESSAGE and str(caught.value).endswith(max(registry.METHODS["draft"]))
    known = str(registry.unknown("architecture", "none", registry.FAMILIES))
    assert all(name in known for name in registry.FAMILIES), "the longest list of names is not cut"


def test_shown_is_one_short_line() -> None:
    assert shown(Unshowable()) == "<Unshowable>" and "\n" not in shown(Lines()) and len(shown(Lines())) < 210


def odd() -> list[Any]:
    """Values of the wrong type, and invalid values of the right type. Made anew each time, because generators are used up."""
    plain = [None, True, 3, -1, 3.5, float("nan"), float("inf"), 10**400, 1j, ..., "", "5", "x\ny", HALF]
    plain += [b"ab", bytearray(b"ab"), memoryview(b"a")]
    nested = [[], [[]], [[[]]], [[1], [2.5]], [None], [True], [object()], [b"a"], [{}], [HALF], ["a", 3]]
    prompts = [{}, {1: 2}, {"prompt": 3}, {"prompt_token_ids": "ab"}, {"prompt_token_ids": [[1]]}, {"prompt": "a", "context": "1"}]
    prompts += [{"prompt": "a", "before": [3.5]}, {"prompt": "a", "reuse": 3}, {"prompt": "a", "pool": 1}]
    chats = [{"messages": 3}, {"messages": [3]}, {"role": 3}, [{"role": 3, "content": 3}], [{1: 2}], [[{"role": "user"}], 3]]
    arrays = [np.array(5), np.array([1.5]), np.array([[1, 2]]), np.array(["a"]), np.array([None]), *tensors(1, [1.5])]
    strange = [object(), Unshowable(), Lines(), len, int, iter([1.5]), (one for one in [object()])]
    strange += [{1}, frozenset({"a"}), range(3), Path("a"), Patch(0, 1, HALF), Patch(1, 0, "a"), SamplingParams(), EngineConfig()]
    return [*plain, *nested, *prompts, *chats, *arrays, *strange]


def survives(call: Callable[[Any], Any], index: int) -> None:
    """A result or one line of RedraftError; in a list of outputs, one line for each error."""
    errors: list[str] = []
    try:
        found = call(odd()[index])
    except RedraftError as error:
        errors = [str(error)]
    else:
        if isinstance(found, list):
            errors = [one.error for one in found if isinstance(one, RequestOutput) and one.error is not None]
    for line in errors:
        assert line and "\n" not in line and len(line) < 2000 and is_utf8(line), repr(line)


CALLS: dict[str, Callable[[LLM, Any], Any]] = {
    "generate": lambda llm, x: llm.generate(x, **SHORT),
    "generate [x]": lambda llm, x: llm.generate(["a", x], **SHORT),
    "generate token": lambda llm, x: llm.generate({"prompt_token_ids": [x]}, **SHORT),
    "generate params": lambda llm, x: llm.generate("a", x) if x is not None and not isinstance(x, SamplingParams) else None,
    "generate [params]": lambda llm, x: llm.generate(["a"], [x]) if x is not None and not isinstance(x, SamplingParams) else None,
    "generate segments": lambda llm, x: llm.generate({"segments": x}, **SHORT),
    "generate [segments]": lambda llm, x: llm.generate({"segments": ["a", x, "b"]}, reuse="cacheblend", **SHORT),
    "generate reuse": lambda llm, x: llm.generate({"segments": ["a", "b"]}, reuse=x, **SHORT),
    "generate scheduler": lambda llm, x: llm.generate("a", scheduler=x, **SHORT),
    "cache": lambda llm, x: llm.cache(x, sink="a"),
    "cache chunk": lambda llm, x: llm.cache([x], sink="a"),
    "cache sink": lambda llm, x: llm.cache(["a"], sink=x),
    "cache lora": lambda llm, x: llm.cache(["a"], sink="a", lora=x),
    "chat": lambda llm, x: llm.chat(x, **SHORT),
    "chat message": lambda llm, x: llm.chat([x], **SHORT),
    "chat content": lambda llm, x: llm.chat([{"role": x, "content": x}], **SHORT),
    "chat params": lambda llm, x: llm.chat(MESSAGES, x) if x is not None and not isinstance(x, SamplingParams) else None,
    "stream": lambda llm, x: list(llm.stream(x, **SHORT)),
    "stream reuse": lambda llm, x: list(llm.stream({"segments": ["a", "b"]}, reuse=x, **SHORT)),
    "stream params": lambda llm, x: list(llm.stream("a", x)) if x is not None and not isinstance(x, SamplingParams) else None,
    "edit text": lambda llm, x: llm.edit(x, Patch(0, 0, ""), **SHORT),
    "edit patch": lambda llm, x: llm.edit("abc", x, **SHORT),
    "edit patches": lambda llm, x: llm.edit("abc", [x], **SHORT),
    "edit place": lambda llm, x: llm.edit("abc", Patch(x, x, x), **SHORT),
    "edit reuse": lambda llm, x: llm.edit("abc", Patch(0, 0, ""), reuse=x, **SHORT),
    "edit params": lambda llm, x: llm.edit("a", Patch(0, 0, ""), x) if x is not None and not isinstance(x, SamplingParams) else None,
    "calibrate": lambda llm, x: llm.calibrate(x),
    "embed": lambda llm, x: llm.embed(x),
    "embed [x]": lambda llm, x: llm.embed([x, x]),
    "embed pooling": lambda llm, x: llm.embed("a", x),
    "embed normalize": lambda llm, x: llm.embed("a", normalize=x),
    "embed lora": lambda llm, x: llm.embed("a", lora=x),
    "load_lora": lambda llm, x: llm.load_lora(x, "none"),
    "load_lora folder": lambda llm, x: llm.load_lora("a", x),
    "unload_lora": lambda llm, x: llm.unload_lora(x),
    "params": lambda llm, x: llm.params(x),
    "cached": lambda llm, x: llm.cached(SamplingParams(), x),
    "guarantee_with_policy": lambda llm, x: llm.guarantee_with_policy(x),
    "guarantee_of": lambda llm, x: llm.guarantee_of(x),
    "guarantee_of reuse": lambda llm, x: llm.guarantee_of(SamplingParams(), x),
    "promise": lambda llm, x: llm.promise(x),
    "config": lambda llm, x: LLM(config=x) if x is not None and not isinstance(x, EngineConfig) else None,
}
COUNT = len(odd())


@pytest.mark.parametrize("name", CALLS)
def test_no_argument_raises_anything_but_one_line(llm: LLM, name: str) -> None:
    for index in range(COUNT):
        survives(lambda value: CALLS[name](llm, value), index)


def test_every_public_method_is_tried() -> None:
    public = {name for name, _ in inspect.getmembers(LLM, inspect.isfunction) if not name.startswith("_")}
    assert public - {"sibling"} == {name.split()[0] for name in CALLS} - {"config"}


@pytest.mark.parametrize("field", sorted(SamplingParams.model_fields))
def test_no_field_of_sampling_params_raises_anything_but_one_line(llm: LLM, field: str) -> None:
    for index in range(COUNT):
        survives(lambda value: llm.generate("a", **{**SHORT, field: value}) if value is not None else None, index)


OPTIONS = sorted(EngineConfig._homes())


@pytest.mark.parametrize("field", OPTIONS)
def test_no_option_raises_anything_but_one_line(llm: LLM, field: str) -> None:
    for index in range(COUNT):
        survives(lambda value: EngineConfig.of(**{field: value}), index)
        survives(lambda value: llm.sibling(**{field: value}), index)


@pytest.mark.parametrize("penalty", [1e-320, 1e308, 0])
def test_a_repetition_penalty_that_would_overflow_is_refused(penalty: float) -> None:
    with pytest.raises(InvalidInput, match=r"^SamplingParams.repetition_penalty = .*at least 0.01 and at most 100"):
        SamplingParams(repetition_penalty=penalty)


def test_complex_numbers_are_no_vectors() -> None:
    with pytest.raises(InvalidInput, match="prompt_embeds of type ndarray: an array of numbers is needed"):
        vectors_of(np.zeros((2, 3), complex))
