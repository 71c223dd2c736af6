"""The official client against a real server. Replies have OpenAI's form, and texts equal those of the engine alone."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from redraft import SamplingParams
from redraft.llm import LLM
from redraft.models import loader
from redraft.serve.service import Service
from tests.serve.conftest import Clock
from tests.serve.live import Live, soon

CODE = "import os\n\nclass Stack:\n    def push(self, item):\n"
ADD = "def add(a, b):\n    "
ACCENTS = "x = 'éééééééééé"  # goes on with more of them, two tokens each
CHAT: Any = [{"role": "user", "content": "What is a list?"}]


def complete(client: openai.OpenAI, prompt: Any = CODE, **options: Any) -> Any:
    given = {"model": "embedded", "temperature": 0, "max_tokens": 24, **options}
    names = {"n", "temperature", "max_tokens", "seed", "stop", "stream", "stream_options", "logprobs", "echo", "logit_bias", "model"}
    names |= {"presence_penalty", "frequency_penalty", "timeout"}
    known = {name: value for name, value in given.items() if name in names}
    return client.completions.create(prompt=prompt, extra_body={k: v for k, v in given.items() if k not in names}, **known)


def chat(client: openai.OpenAI, messages: Any = CHAT, **options: Any) -> Any:
    given = {"model": "embedded", "temperature": 0, "max_completion_tokens": 24, **options}
    extra = given.pop("extra", {})
    return client.chat.completions.create(messages=messages, extra_body=extra, **given)


def text(client: openai.OpenAI, prompt: Any = CODE, **options: Any) -> str:
    return str(complete(client, prompt, **options).choices[0].text)


def alone(llm: LLM, prompt: Any = CODE, **params: Any) -> Any:
    """The same text from the engine, without drafts."""
    given = {"temperature": 0, "max_tokens": 24, "draft": "none", **params}
    return llm.generate(prompt, SamplingParams(**given))[0]


def call(live: Live, path: str, body: Any = None, **options: Any) -> Any:
    """An endpoint that the client has no method for."""
    with live.client(**options) as client:
        client.base_url = live.url  # type: ignore[assignment]
        return client.get(path, cast_to=object) if body is None else client.post(path, body=body, cast_to=object)


# ---- chat


def test_chat(client: openai.OpenAI, llm: LLM) -> None:
    reply = chat(client)
    (choice,) = reply.choices
    expected = llm.chat(CHAT, SamplingParams(temperature=0, max_tokens=24, draft="none"))[0]
    assert (choice.message.role, choice.message.content, choice.message.refusal) == ("assistant", expected.outputs[0].text, None)
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert (reply.object, reply.model, reply.id[:9]) == ("chat.completion", "embedded", "chatcmpl-")
    assert reply.system_fingerprint.startswith("redraft-")
    assert reply._request_id == reply.id  # of a header, as OpenAI's
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        len(expected.prompt_token_ids),
        24,
        usage.prompt_tokens + 24,
    )
    assert usage.completion_tokens_details is None


def test_a_stream_of_a_chat_is_the_reply_in_pieces(client: openai.OpenAI) -> None:
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert "".join(chunk.choices[0].delta.content for chunk in pieces) == whole.choices[0].message.content
    assert [chunk.choices[0].delta.role for chunk in pieces] == ["assistant"] + [None] * (len(pieces) - 1)
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {(chunk.object, chunk.model, chunk.created) for chunk in chunks} == {("chat.completion.chunk", "embedded", chunks[0].created)}
    assert [chunk.usage for chunk in pieces] == [None] * len(pieces)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


@pytest.mark.parametrize("extra", [{}, {"provenance": True, "return_token_ids": True}], ids=str)
def test_the_client_s_own_way_to_gather_a_stream(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    whole = chat(client, stop=",", logprobs=True)
    given: Any = {"messages": CHAT, "temperature": 0, "max_completion_tokens": 24, "stop": ",", "logprobs": True, "extra_body": extra}
    with client.chat.completions.stream(model="embedded", stream_options={"include_usage": True}, **given) as stream:
        got = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert got == final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"
    assert final.choices[0].logprobs == whole.choices[0].logprobs
    assert final.usage == whole.usage
    assert client.chat.completions.parse(model="embedded", **given).choices[0].message.content == got


def test_the_last_line_of_a_stream_is_done(client: openai.OpenAI) -> None:
    with client.completions.with_streaming_response.create(model="embedded", prompt=CODE, max_tokens=5, stream=True) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: {") for line in lines[:-1])


def test_a_step_that_kept_drafts_is_one_chunk_of_several_tokens(client: openai.OpenAI) -> None:
    def sizes(**options: Any) -> tuple[list[int], list[int]]:
        chunks = list(complete(client, ADD, max_tokens=48, stream=True, return_token_ids=True, **options))
        ids = [chunk.choices[0].model_extra["token_ids"] for chunk in chunks]
        return [len(one) for one in ids], [token for one in ids for token in one]

    drafted, off = sizes(), sizes(speculation="off")
    assert drafted[1] == off[1]
    assert set(off[0]) == {1}
    assert max(drafted[0]) > 2


def test_a_conversation_goes_on(client: openai.OpenAI, llm: LLM) -> None:
    """The end of the last message is the beginning of the reply."""
    messages: Any = [*CHAT, {"role": "assistant", "content": "A list is"}]
    reply = chat(client, messages, extra={"continue_final_message": True, "return_token_ids": True})
    prompt = llm.tokenizer.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert prompt.endswith("Answer: A list is")
    assert reply.model_extra["prompt_token_ids"] == llm.tokenizer.encode(prompt, special=False)
    assert reply.choices[0].message.content == alone(llm, {"prompt_token_ids": reply.model_extra["prompt_token_ids"]}).outputs[0].text
    with pytest.raises(openai.BadRequestError, match="exclude each other"):
        chat(client, messages, extra={"continue_final_message": True, "add_generation_prompt": True})


def test_a_conversation_without_the_beginning_of_a_reply(client: openai.OpenAI, llm: LLM) -> None:
    got = [chat(client, extra={"add_generation_prompt": given, "return_token_ids": True}) for given in (False, True, None)]
    plain = llm.tokenizer.encode_chat(CHAT, add_generation_prompt=False)
    assert [reply.model_extra["prompt_token_ids"] for reply in got] == [plain, *[llm.tokenizer.encode_chat(CHAT)] * 2]


def test_contents_in_parts(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " a list?"}]
    assert chat(client, [{"role": "user", "content": parts}]).choices[0].message.content == chat(client).choices[0].message.content
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}])
    assert error.value.param.startswith("messages.0.content")


# ---- completions


def test_a_completion_has_sixteen_tokens_where_it_does_not_say(client: openai.OpenAI, llm: LLM) -> None:
    reply = client.completions.create(model="embedded", prompt=CODE, temperature=0)
    assert reply.usage is not None
    assert (reply.object, reply.usage.completion_tokens) == ("text_completion", 16)
    assert reply.choices[0].text == alone(llm, max_tokens=16).outputs[0].text


def test_prompts_in_every_form(client: openai.OpenAI, llm: LLM) -> None:
    ids = [llm.tokenizer.encode(prompt) for prompt in (CODE, ADD)]
    expected = [alone(llm, prompt).outputs[0].text for prompt in (CODE, ADD)]
    assert text(client, CODE) == text(client, ids[0]) == expected[0]
    for prompts in ([CODE, ADD], ids):
        reply = complete(client, prompts)
        assert [(choice.index, choice.text) for choice in reply.choices] == list(enumerate(expected))
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids[0]) + len(ids[1]), 48)


def test_prompts_without_special_tokens(client: openai.OpenAI) -> None:
    counts = [complete(client, add_special_tokens=given).usage.prompt_tokens for given in (True, False)]
    assert counts[0] == counts[1] + 1


def test_n_texts_of_several_prompts_in_a_stream(client: openai.OpenAI, llm: LLM) -> None:
    options = {"n": 3, "temperature": 1.0, "seed": 11, "max_tokens": 12}
    whole = complete(client, [CODE, ADD], **options)
    joined = [""] * 6
    reasons: list[Any] = [None] * 6
    for chunk in complete(client, [CODE, ADD], stream=True, **options):
        (choice,) = chunk.choices
        assert reasons[choice.index] is None
        joined[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    assert joined == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    direct = [one.text for prompt in (CODE, ADD) for one in alone(llm, prompt, **options).outputs]
    assert joined == direct
    assert len(set(joined)) == 6
    assert joined[0] == text(client, CODE, **{**options, "n": 1})  # the first of n is the only one of one


def test_a_chat_of_n(client: openai.OpenAI) -> None:
    options: Any = {"n": 2, "temperature": 1.0, "seed": 5, "max_completion_tokens": 8}
    whole = chat(client, **options)
    joined, roles = ["", ""], [0, 0]
    for chunk in chat(client, stream=True, **options):
        joined[chunk.choices[0].index] += chunk.choices[0].delta.content
        roles[chunk.choices[0].index] += chunk.choices[0].delta.role == "assistant"
    assert joined == [choice.message.content for choice in whole.choices]
    assert roles == [1, 1]


# ---- the same seed, the same text

SAMPLED: dict[str, Any] = {"temperature": 0.6, "seed": 7, "max_tokens": 40}
TWICE = CODE + "        self.items.append(item)\n\n    def pop(self):\n        self.items"  # something to copy
METHODS = [
    "none",
    "aggressive",
    "copyspec",
    "token-recycling",
    "self-skip",
    "draft-model",
    "dyspec",
    "rsd-s",
    "union:parts=copyspec+self-skip",
]


@pytest.fixture(scope="module")
def plain(llm: LLM) -> str:
    return str(alone(llm, TWICE, **SAMPLED).outputs[0].text)


def test_speculation_off(client: openai.OpenAI, plain: str) -> None:
    reply = complete(client, TWICE, **SAMPLED, speculation="off")
    assert reply.choices[0].text == plain
    assert (reply.model_extra["metrics"]["drafted"], reply.model_extra["metrics"]["steps"]) == (0, 40)


@pytest.mark.parametrize("method", METHODS)
def test_no_drafter_changes_a_text(client: openai.OpenAI, plain: str, method: str) -> None:
    reply = complete(client, TWICE, **SAMPLED, speculation={"method": method, "verifier": "coupled", "budget": 6})
    assert reply.choices[0].text == plain
    metrics = reply.model_extra["metrics"]
    assert (metrics["drafted"] > 0) == (method != "none")
    assert metrics["drafted"] <= 6 * metrics["steps"]


@pytest.mark.parametrize(("verifier", "method"), [("rejection", "draft-model"), ("recursive", "rsd-s"), ("typical", "draft-model")])
def test_other_verifiers_give_the_same_text_for_the_same_seed(client: openai.OpenAI, verifier: str, method: str) -> None:
    chosen = {"method": method, "verifier": verifier}
    first, second = (complete(client, TWICE, **SAMPLED, speculation=chosen) for _ in range(2))
    assert first.choices[0].text == second.choices[0].text
    assert first.model_extra["metrics"]["accepted"] > 0


def test_a_seed_that_was_not_given_is_reported(client: openai.OpenAI) -> None:
    first = complete(client, temperature=1.0)
    (seed,) = first.model_extra["metrics"]["seeds"]
    assert text(client, temperature=1.0, seed=seed) == first.choices[0].text
    assert text(client, temperature=1.0, seed=seed + 1) != first.choices[0].text


def test_seeds_of_every_size(client: openai.OpenAI) -> None:
    assert text(client, temperature=1.0, seed=-1) == text(client, temperature=1.0, seed=2**64 - 1)


def test_many_at_once_give_what_each_gives_alone(live: Live, client: openai.OpenAI) -> None:
    """With the asynchronous client: streams and whole replies, with several methods in one batch."""
    choices: list[Any] = ["off", {"method": "copyspec"}, {"method": "draft-model"}, None]
    asked = [
        {"prompt": (CODE, ADD)[i % 2], "seed": i, "temperature": 0.8, "max_tokens": 16, "extra_body": {"speculation": choices[i % 4]}}
        for i in range(8)
    ]

    async def one(remote: openai.AsyncOpenAI, given: Any, stream: bool) -> str:
        if not stream:
            return str((await remote.completions.create(model="embedded", **given)).choices[0].text)
        return "".join([chunk.choices[0].text async for chunk in await remote.completions.create(model="embedded", stream=True, **given)])

    async def all_of_them() -> list[str]:
        async with live.asynchronous() as remote:
            return await asyncio.gather(*(one(remote, given, i % 3 == 0) for i, given in enumerate(asked)))

    together = asyncio.run(all_of_them())
    assert together == [client.completions.create(model="embedded", **given).choices[0].text for given in asked]


# ---- log-probabilities


def test_logprobs_of_a_chat(client: openai.OpenAI, llm: LLM) -> None:
    (choice,) = chat(client, logprobs=True, top_logprobs=3).choices
    direct = llm.chat(CHAT, SamplingParams(temperature=0, max_tokens=24, draft="none", logprobs=3))[0].outputs[0]
    assert b"".join(bytes(one.bytes) for one in choice.logprobs.content).decode() == choice.message.content
    assert direct.logprobs is not None
    assert [one.logprob for one in choice.logprobs.content] == [one.logprob for one in direct.logprobs]
    for got, one in zip(choice.logprobs.content, direct.logprobs, strict=True):
        assert [(bytes(top.bytes), top.logprob) for top in got.top_logprobs] == [(llm.tokenizer.bytes_of(t), p) for t, p in one.top]
    streamed = [one for chunk in chat(client, logprobs=True, top_logprobs=3, stream=True) for one in chunk.choices[0].logprobs.content]
    assert [one.model_dump() for one in streamed] == [one.model_dump() for one in choice.logprobs.content]


def test_logprobs_of_a_chat_without_others(client: openai.OpenAI) -> None:
    (choice,) = chat(client, logprobs=True).choices
    assert [one.top_logprobs for one in choice.logprobs.content] == [[]] * 24
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, top_logprobs=2)
    assert error.value.param == "top_logprobs"


def test_logprobs_of_a_completion(client: openai.OpenAI, llm: LLM) -> None:
    """The chosen token is among the likeliest ones, or is added to them."""
    options = {"logprobs": 2, "temperature": 1.0, "seed": 3}
    (choice,) = complete(client, **options).choices
    direct = alone(llm, **options).outputs[0]
    found = choice.logprobs
    assert found.tokens == [llm.tokenizer.bytes_of(token).decode() for token in direct.token_ids]
    assert found.token_logprobs == [one.logprob for one in direct.logprobs]
    for i, one in enumerate(direct.logprobs):
        assert found.top_logprobs[i] == {llm.tokenizer.bytes_of(t).decode(): p for t, p in (*one.top, (one.token, one.logprob))}
        assert list(found.top_logprobs[i].values()) == sorted(found.top_logprobs[i].values(), reverse=True)
    assert {len(top) for top in found.top_logprobs} == {2, 3}
    assert [choice.text[at : at + len(token)] for at, token in zip(found.text_offset, found.tokens, strict=True)] == found.tokens
    joined = openai.types.completion_choice.Logprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[]).model_dump()
    for chunk in complete(client, stream=True, **options):
        for name, values in chunk.choices[0].logprobs.model_dump().items():
            joined[name] += values
    assert joined == found.model_dump()


def test_echo_has_the_prompt_alone(client: openai.OpenAI, llm: LLM) -> None:
    """As evaluation tools request it: nothing is generated, the whole prompt is scored."""
    reply = complete(client, ADD, echo=True, logprobs=1, max_tokens=0)
    (choice,) = reply.choices
    direct = alone(llm, ADD, prompt_logprobs=1, max_tokens=1)
    assert (choice.text, choice.finish_reason, reply.usage.completion_tokens) == (ADD, "length", 0)
    assert choice.logprobs.token_logprobs == [None, *(one.logprob for one in direct.prompt_logprobs[1:])]
    assert choice.logprobs.tokens == [llm.tokenizer.bytes_of(token).decode() for token in direct.prompt_token_ids]
    offsets = choice.logprobs.text_offset
    assert offsets[:2] == [0, 0]  # <s> is no letter of this text
    pairs = list(zip(choice.logprobs.tokens, offsets, strict=True))
    assert [ADD[at : at + len(token)] for token, at in pairs[1:]] == choice.logprobs.tokens[1:]
    (chunk,) = complete(client, ADD, echo=True, logprobs=1, max_tokens=0, stream=True)
    assert chunk.choices[0].model_dump() == choice.model_dump()


def test_echo_before_what_is_generated(client: openai.OpenAI, llm: LLM) -> None:
    """Also for prompts given as tokens, whose special tokens are then part of the text."""
    for prompt, before in ((ADD, ADD), (llm.tokenizer.encode(ADD), "<s>" + ADD)):
        (choice,) = complete(client, prompt, echo=True, logprobs=0, max_tokens=5).choices
        assert choice.text == before + alone(llm, ADD, max_tokens=5).outputs[0].text
        found = choice.logprobs
        got = [(at, token) for at, token in zip(found.text_offset, found.tokens, strict=True) if token != "<s>" or before != ADD]
        assert [choice.text[at : at + len(token)] for at, token in got] == [token for _, token in got]
        assert sum(len(token) for _, token in got) == len(choice.text)
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, ADD, max_tokens=0)
    assert error.value.param == "max_tokens"


def test_prompt_logprobs(client: openai.OpenAI, llm: LLM) -> None:
    direct = alone(llm, ADD, prompt_logprobs=2, max_tokens=4)
    got = complete(client, ADD, prompt_logprobs=2, max_tokens=4).choices[0].model_extra["prompt_logprobs"]
    assert got[0] is None
    for entry, one in zip(got[1:], direct.prompt_logprobs[1:], strict=True):
        assert {int(token): given["logprob"] for token, given in entry.items()} == dict([*one.top, (one.token, one.logprob)])
        given = entry[str(one.token)]
        assert (given["rank"], given["decoded_token"]) == (one.rank, llm.tokenizer.bytes_of(one.token).decode())
    (both,) = complete(client, ADD, prompt_logprobs=2, max_tokens=4, logprobs=1, echo=True).choices
    assert both.model_extra["prompt_logprobs"] == got
    assert [len(top) for top in both.logprobs.top_logprobs[1:]] == [
        1 + (one.rank > 1) for one in (*direct.prompt_logprobs[1:], *alone(llm, ADD, logprobs=1, max_tokens=4).outputs[0].logprobs)
    ]
    reply = chat(client, extra={"prompt_logprobs": 0})
    assert len(reply.model_extra["prompt_logprobs"]) == reply.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, ADD, prompt_logprobs=2, stream=True)
    assert error.value.param == "prompt_logprobs"


def test_token_ids(client: openai.OpenAI, llm: LLM) -> None:
    direct = alone(llm)
    (choice,) = complete(client, return_token_ids=True).choices
    assert choice.model_extra["prompt_token_ids"] == direct.prompt_token_ids
    assert choice.model_extra["token_ids"] == direct.outputs[0].token_ids
    assert "token_ids" not in complete(client).choices[0].model_extra


# ---- letters of several tokens


@pytest.mark.parametrize("speculation", ["off", None])
def test_letters_are_never_split(client: openai.OpenAI, llm: LLM, speculation: Any) -> None:
    options: Any = {"max_tokens": 15, "speculation": speculation}
    (choice,) = complete(client, ACCENTS, logprobs=0, return_token_ids=True, **options).choices
    assert "ééé" in choice.text
    ids = choice.model_extra["token_ids"]
    assert any(len(llm.tokenizer.bytes_of(token).decode(errors="ignore")) == 0 for token in ids)
    pieces = [chunk.choices[0].text for chunk in complete(client, ACCENTS, stream=True, **options)]
    assert "".join(pieces) == choice.text
    assert not any("\ufffd" in piece for piece in pieces[:-1])
    raw = [llm.tokenizer.bytes_of(token) for token in ids]
    begins = [len(b"".join(raw[:i]).decode(errors="ignore")) for i in range(len(raw))]
    assert choice.logprobs.text_offset == begins


def test_bytes_that_are_no_letters(client: openai.OpenAI, llm: LLM) -> None:
    """The first of three bytes, repeated: each is sent as a replacement character, none is lost."""
    byte = llm.tokenizer.encode("世", special=False)[-3]
    options: Any = {"logit_bias": {str(byte): 100}, "max_tokens": 6, "logprobs": 0}
    (choice,) = complete(client, ADD, **options).choices
    assert choice.text == "\ufffd" * 6
    assert "".join(chunk.choices[0].text for chunk in complete(client, ADD, stream=True, **options)) == choice.text


# ---- where a text ends


@pytest.mark.parametrize("speculation", ["off", {"method": "token-recycling"}])
def test_stop_strings_never_leak(client: openai.OpenAI, llm: LLM, speculation: Any) -> None:
    """Stops within a token and over several, in whole replies and in every chunk of a stream."""
    full = alone(llm, ADD, max_tokens=40).outputs[0].text
    for stop in (full[12:14], full[9:25], full[3:33], [full[20:28], "nowhere", full[30:36]]):
        first = min(full.find(one) for one in ([stop] if isinstance(stop, str) else stop) if one in full)
        options: Any = {"stop": stop, "max_tokens": 40, "speculation": speculation}
        (choice,) = complete(client, ADD, **options).choices
        assert (choice.text, choice.finish_reason) == (full[:first], "stop")
        got, reason = "", None
        for chunk in complete(client, ADD, stream=True, **options):
            got, reason = got + chunk.choices[0].text, chunk.choices[0].finish_reason
            assert full[:first].startswith(got)
        assert (got, reason) == (full[:first], "stop")
    longer = full[9:25]
    kept = text(client, ADD, stop=longer, max_tokens=40, include_stop_str_in_output=True)
    assert kept == full[: full.find(longer) + len(longer)]


def test_what_only_begins_like_a_stop_is_reported_in_the_end(client: openai.OpenAI, llm: LLM) -> None:
    full = alone(llm, ADD, max_tokens=20).outputs[0].text
    pieces = [chunk.choices[0].text for chunk in complete(client, ADD, stream=True, max_tokens=20, stop=full[-6:] + "\x00")]
    assert "".join(pieces) == full


def test_stop_tokens(client: openai.OpenAI, llm: LLM) -> None:
    ids = alone(llm, ADD).outputs[0].token_ids
    token = ids[7]
    reply = complete(client, ADD, stop_token_ids=[token], return_token_ids=True)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].model_extra["token_ids"] == ids[: ids.index(token) + 1]
    later = complete(client, ADD, stop_token_ids=[token], min_tokens=ids.index(token) + 2, return_token_ids=True)
    assert later.usage.completion_tokens > ids.index(token) + 1


def test_the_end_of_a_text(client: openai.OpenAI, llm: LLM) -> None:
    prompt = "for i in range(10):\n    print("
    reply = complete(client, prompt)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens < 24
    assert "</s>" not in reply.choices[0].text
    assert complete(client, prompt, ignore_eos=True).usage.completion_tokens == 24
    assert complete(client, prompt, min_tokens=9).usage.completion_tokens >= 9
    assert text(client, prompt, skip_special_tokens=False) == reply.choices[0].text + "</s>"


def test_the_context_ends(client: openai.OpenAI, llm: LLM) -> None:
    prompt = [5] * (llm.max_model_len - 3)
    reply = complete(client, prompt, ignore_eos=True)
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 3)
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, [5] * llm.max_model_len)
    assert (error.value.code, error.value.type) == ("context_length_exceeded", "invalid_request_error")


def test_both_names_of_the_most_tokens(client: openai.OpenAI) -> None:
    assert chat(client, max_completion_tokens=None, max_tokens=3).usage.completion_tokens == 3
    assert chat(client, max_completion_tokens=3, max_tokens=3).usage.completion_tokens == 3
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, max_completion_tokens=3, max_tokens=4)
    assert error.value.param == "max_completion_tokens"


# ---- sampling

SETTINGS: list[dict[str, Any]] = [
    {"top_k": 5},
    {"min_p": 0.2},
    {"typical_p": 0.5},
    {"dry_multiplier": 1.0, "dry_allowed_length": 1, "dry_sequence_breakers": ["("], "xtc_probability": 0.5},
    {"top_n_sigma": 0.9, "dynatemp_range": 0.5, "dynatemp_exponent": 2.0},
    {"mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.2},
    {"repetition_penalty": 1.5},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"bad_words": ["self", "="]},
    {"min_tokens": 20},
    {"temperature": 1.7, "top_k": 3},
]


@pytest.mark.parametrize("given", SETTINGS, ids=lambda given: "+".join(given))
def test_sampling_is_the_engine_s(client: openai.OpenAI, llm: LLM, given: dict[str, Any]) -> None:
    options = {**SAMPLED, "max_tokens": 24, **given}
    direct = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    assert text(client, **options) == alone(llm, **direct).outputs[0].text


def test_controls(client: openai.OpenAI, llm: LLM) -> None:
    options = {"temperature": 0, "max_tokens": 40}
    plain, expected = (alone(llm, **options, control=control).outputs[0].text for control in (None, "momentum:k=8"))
    assert text(client, **options, control="momentum:k=8") == expected != plain
    assert text(client, **options, control="none") == plain
    for control, said in (
        ("momentun", "no control method 'momentun'"),
        ("momentum:k=0", "momentum:k=0: must be 1 to 1024"),
        ("momentum:k=2000000", "momentum:k=2000000: at most 1048576 is allowed in a request"),
        ("+".join(["momentum"] * 9), "it has 9 parts, at most 8 are allowed in a request"),
    ):
        with pytest.raises(openai.BadRequestError, match=said) as error:
            text(client, **options, control=control)
        assert error.value.param == "control"


def test_top_p(client: openai.OpenAI, llm: LLM) -> None:
    reply = client.completions.create(model="embedded", prompt=CODE, seed=7, temperature=1.0, top_p=0.4)
    assert reply.choices[0].text == alone(llm, max_tokens=16, seed=7, temperature=1.0, top_p=0.4).outputs[0].text


def test_logit_bias(client: openai.OpenAI, llm: LLM) -> None:
    ids = alone(llm).outputs[0].token_ids
    banned = complete(client, logit_bias={str(ids[0]): -100}, return_token_ids=True).choices[0].model_extra["token_ids"]
    assert ids[0] not in banned
    forced = complete(client, logit_bias={"918": 100}, max_tokens=4, return_token_ids=True).choices[0].model_extra["token_ids"]
    assert forced == [918] * 4


def test_the_checkpoint_s_own_settings_hold_where_nothing_is_given(client: openai.OpenAI, llm: LLM) -> None:
    assert llm.defaults == {"temperature": 0.5}
    reply = client.completions.create(model="embedded", prompt=CODE, seed=3)
    assert reply.choices[0].text == alone(llm, temperature=0.5, seed=3, max_tokens=16).outputs[0].text


# ---- predictions


def test_a_perfect_prediction_is_accepted(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "How does a stack work?"}]
    without = chat(client, messages, max_completion_tokens=40, extra={"speculation": "off"})
    answer = without.choices[0].message.content
    assert answer is not None
    predicted = chat(client, messages, max_completion_tokens=40, prediction={"type": "content", "content": answer})
    wrong = chat(client, messages, max_completion_tokens=40, prediction={"type": "content", "content": answer[:20] + " or not to be"})
    parts = chat(client, messages, max_completion_tokens=40, prediction={"type": "content", "content": [{"type": "text", "text": answer}]})
    assert {reply.choices[0].message.content for reply in (predicted, wrong, parts)} == {answer}
    assert without.usage.completion_tokens_details is None
    details = predicted.usage.completion_tokens_details
    assert details.accepted_prediction_tokens > 24
    assert parts.usage.completion_tokens_details.accepted_prediction_tokens > 24
    other = wrong.usage.completion_tokens_details
    assert other.accepted_prediction_tokens < details.accepted_prediction_tokens
    assert other.rejected_prediction_tokens > details.rejected_prediction_tokens
    assert predicted.model_extra["metrics"]["steps"] < wrong.model_extra["metrics"]["steps"]


def test_a_prediction_of_a_completion_and_in_a_stream(client: openai.OpenAI) -> None:
    answer = text(client, ADD, max_tokens=32)
    predicted = complete(client, ADD, max_tokens=32, prediction={"type": "content", "content": answer})
    assert predicted.choices[0].text == answer
    assert predicted.usage.completion_tokens_details.accepted_prediction_tokens > 16
    *_, last = complete(client, ADD, max_tokens=32, prediction={"content": answer}, stream=True, stream_options={"include_usage": True})
    assert last.usage.completion_tokens_details.accepted_prediction_tokens > 16
    off = complete(client, ADD, max_tokens=32, prediction={"content": answer}, speculation="off")
    assert (off.choices[0].text, off.model_extra["metrics"]["drafted"]) == (answer, 0)


# ---- provenance


@pytest.mark.parametrize("method", ["token-recycling", "draft-model"])
def test_provenance(client: openai.OpenAI, llm: LLM, method: str) -> None:
    options: Any = {"max_tokens": 32, "speculation": {"method": method}, "return_token_ids": True}
    reply = complete(client, ADD, provenance=True, **options)
    (choice,) = reply.choices
    assert choice.text == text(client, ADD, **options)
    got, trees = choice.model_extra["provenance"], choice.model_extra["trees"]
    direct = alone(llm, ADD, max_tokens=32, logprobs=5).outputs[0]
    assert [one["token_id"] for one in got] == choice.model_extra["token_ids"] == direct.token_ids
    for one, known in zip(got, direct.logprobs, strict=True):
        assert (one["probability"], one["rank"]) == (math.exp(known.logprob), known.rank)
        beside = [(token, math.exp(p)) for token, p in known.top if token != known.token][:4]
        assert [(other["token_id"], other["probability"]) for other in one["alternatives"]] == beside
    metrics = reply.model_extra["metrics"]
    assert [tree["step"] for tree in trees] == list(range(1, metrics["steps"] + 1))
    assert sum(len(tree["nodes"]) for tree in trees) == metrics["drafted"]
    for tree in trees:
        kept = [i for i, node in enumerate(tree["nodes"]) if node["accepted"]]
        assert [tree["nodes"][i]["parent"] for i in kept] == [-1, *kept][: len(kept)]
        tokens = [(one["token_id"], one["origin"]) for one in got if one["step"] == tree["step"]]
        assert tokens == [*((tree["nodes"][i]["token_id"], method) for i in kept), tokens[-1]]
        assert tokens[-1][1] == "model"
        assert all(-1 <= node["parent"] < i for i, node in enumerate(tree["nodes"]))
    streamed = list(complete(client, ADD, provenance=True, stream=True, **options))
    assert [len(chunk.choices[0].model_extra["trees"]) for chunk in streamed] == [1] * len(streamed)
    pieces = [one for chunk in streamed for one in chunk.choices[0].model_extra["provenance"]]
    if method == "draft-model":  # it remembers nothing of other requests: two runs draft the same
        assert pieces == got
        assert [tree for chunk in streamed for tree in chunk.choices[0].model_extra["trees"]] == trees
    assert [one["token_id"] for one in pieces] == direct.token_ids


def test_provenance_names_the_part_of_a_union(client: openai.OpenAI) -> None:
    answer = text(client, ADD, max_tokens=32)
    options: Any = {"speculation": {"method": "draft-model"}, "prediction": {"content": answer}, "provenance": True}
    (choice,) = complete(client, ADD, max_tokens=32, **options).choices
    assert {one["origin"] for one in choice.model_extra["provenance"]} == {"aggressive", "model"}
    assert {"aggressive", "draft-model"} == {node["origin"] for tree in choice.model_extra["trees"] for node in tree["nodes"]}
    assert choice.logprobs is None


def test_metrics_add_up(client: openai.OpenAI) -> None:
    reply = complete(client, ADD, max_tokens=40)
    found = reply.model_extra["metrics"]
    assert found["steps"] + found["accepted"] == reply.usage.completion_tokens == 40
    assert found["mean_acceptance_length"] == round(40 / found["steps"], 4)
    assert sum(found["acceptance_by_position"]) == found["accepted"] <= found["drafted"]
    assert found["acceptance_by_position"] == sorted(found["acceptance_by_position"], reverse=True)
    assert 0 <= found["queue_time"] <= found["time_to_first_token"] < 30
    assert 0 < found["mean_inter_token_latency"] < 30
    assert (found["faults"], len(found["seeds"])) == ([], 1)
    *_, last = complete(client, ADD, max_tokens=40, stream=True)
    assert last.model_extra["metrics"].keys() == found.keys()
    single = complete(client, ADD, max_tokens=1).model_extra["metrics"]
    assert (single["mean_inter_token_latency"], single["steps"]) == (None, 1)


# ---- the cache


@pytest.mark.parametrize(
    "policy",
    [{"keep": "streaming-llm:sinks=2,recent=30"}, {"codec": "int8"}, {"codec": "int4"}, {"read": "page-top-k"}, {"keep": "none"}],
    ids=str,
)
def test_a_cache_policy_of_the_request(client: openai.OpenAI, llm: LLM, policy: dict[str, str]) -> None:
    prompt = CODE * 5
    assert text(client, prompt, cache=policy) == alone(llm, prompt, **policy).outputs[0].text


def test_prefixes_are_shared_under_the_same_salt(live: Live, client: openai.OpenAI) -> None:
    call(live, "/reset_prefix_cache", {})
    prompt = [(7 * i) % 4000 + 5 for i in range(100)]

    def cached(salt: str | None) -> int:
        return int(complete(client, prompt, max_tokens=1, cache_salt=salt).usage.prompt_tokens_details.cached_tokens)

    assert [cached("one"), cached("one"), cached("two"), cached(None), cached(None)] == [0, 96, 0, 0, 96]
    assert call(live, "/reset_prefix_cache", {})["pages"] > 0
    assert cached("one") == 0


# ---- embeddings

TEXTS = ["def add(a, b):", "a list of strings, and what can be done with it", "é"]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings(client: openai.OpenAI, llm: LLM, pooling: str) -> None:
    extra = {"pooling": pooling}
    floats = client.embeddings.create(model="embedded", input=TEXTS, encoding_format="float", extra_body=extra)
    encoded = client.embeddings.create(model="embedded", input=TEXTS, extra_body=extra)  # the client asks for base64 and decodes it
    direct = llm.embed(TEXTS, pooling)
    assert [one.index for one in floats.data] == [0, 1, 2]
    for one, other, expected in zip(floats.data, encoded.data, direct, strict=True):
        assert one.embedding == other.embedding == expected.astype(np.float32).tolist()
    tokens = sum(len(llm.tokenizer.encode(one)) for one in TEXTS)
    assert (floats.usage.prompt_tokens, floats.usage.total_tokens, floats.object) == (tokens, tokens, "list")
    raw = client.embeddings.create(model="embedded", input=TEXTS[0], extra_body={**extra, "normalize": False})
    length = float(np.linalg.norm(raw.data[0].embedding))
    assert length > 1.5
    np.testing.assert_allclose(np.asarray(raw.data[0].embedding) / length, direct[0], atol=1e-6)
    ids = client.embeddings.create(model="embedded", input=llm.tokenizer.encode(TEXTS[0]), extra_body=extra)
    assert ids.data[0].embedding == floats.data[0].embedding


@pytest.fixture(scope="module")
def hidden(llm: LLM) -> list[np.ndarray]:
    """From Hugging Face's implementation, after the final norm."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(loader.resolve("embedded"), dtype=torch.float32)
    with torch.no_grad():
        return [model(torch.tensor([llm.tokenizer.encode(one)])).last_hidden_state[0].double().numpy() for one in TEXTS]


@pytest.mark.torch
def test_embeddings_are_hugging_face_s_hidden_states(client: openai.OpenAI, hidden: list[np.ndarray]) -> None:
    for pooling in ("last", "mean"):
        got = client.embeddings.create(model="embedded", input=TEXTS, extra_body={"pooling": pooling})
        for one, states in zip(got.data, hidden, strict=True):
            expected = states[-1] if pooling == "last" else states.mean(0)
            assert float(np.dot(one.embedding, expected) / np.linalg.norm(expected)) > 0.99999
        raw = client.embeddings.create(model="embedded", input=TEXTS, extra_body={"pooling": pooling, "normalize": False})
        for one, states in zip(raw.data, hidden, strict=True):
            expected = states[-1] if pooling == "last" else states.mean(0)
            np.testing.assert_allclose(one.embedding, expected, rtol=1e-3, atol=1e-3)


def test_a_text_s_last_hidden_state_from_the_prefix_cache(live: Live, client: openai.OpenAI) -> None:
    prompt = [(11 * i) % 4000 + 5 for i in range(80)]
    call(live, "/reset_prefix_cache", {})
    first, second = (client.embeddings.create(model="embedded", input=prompt).data[0].embedding for _ in range(2))
    assert first == second


# ---- the rest of the interface


def test_models(live: Live, client: openai.OpenAI, llm: LLM) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("embedded", "model", "redraft")
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == llm.max_model_len
    assert client.models.retrieve("embedded") == model
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other/model")
    assert error.value.code == "model_not_found"


def test_text_to_tokens_and_back(live: Live, llm: LLM) -> None:
    for given in (ADD, "é 世 \N{GRINNING FACE}\n\t", ""):
        got = call(live, "/tokenize", {"prompt": given, "return_token_strs": True})
        assert got["tokens"] == llm.tokenizer.encode(given)
        assert (got["count"], got["max_model_len"], len(got["token_strs"])) == (len(got["tokens"]), llm.max_model_len, got["count"])
        assert call(live, "/detokenize", {"tokens": got["tokens"]}) == {"prompt": "<s>" + given, "content": "<s>" + given}
        bare = call(live, "/tokenize", {"prompt": given, "add_special_tokens": False})["tokens"]
        assert call(live, "/detokenize", {"tokens": bare}) == {"prompt": given, "content": given}
    assert call(live, "/tokenize", {"messages": CHAT})["tokens"] == llm.tokenizer.encode_chat(CHAT)


def test_who_is_there(live: Live) -> None:
    assert call(live, "/health") == {"status": "ok"}
    assert call(live, "/ready") == {"status": "ready"}
    assert call(live, "/version")["version"]
    info = call(live, "/server_info")
    assert (info["draft"], info["verify"], info["max_model_len"], info["models"]) == ("token-recycling", "coupled", 512, ["embedded"])
    assert info["parsers"] == {"tool_calls": "hermes", "reasoning": None}
    assert "copyspec" in info["methods"]["draft"]


def test_what_has_no_effect_is_accepted(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="embedded", messages=CHAT, temperature=0, max_completion_tokens=24, user="u", metadata={"a": "b"}, store=False,
        safety_identifier="s", prompt_cache_key="k", service_tier="auto", response_format={"type": "text"}, logit_bias={}, stop=[],
        tools=[], tool_choice="none", modalities=["text"],
    )  # fmt: skip
    assert reply.choices[0].message.content == chat(client).choices[0].message.content
    assert text(client, best_of=1, use_beam_search=False, suffix=None) == text(client)


# ---- errors

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"stop_token_ids": [4096]}, "stop_token_ids.0"),
    ({"min_tokens": 99}, "min_tokens"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"guided_json": {}}, "guided_json"),
    ({"topk": 5}, "topk"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": "perhaps"}, "stream"),
    ({"stream_options": {"include_usag": True}, "stream": True}, "stream_options.include_usag"),
    ({"prompt": ["a", 5]}, "prompt.1"),
    ({"str": 5}, "str"),
    ({"speculation": "on"}, "speculation"),
    ({"speculation": {"methods": "none"}}, "speculation.methods"),
    ({"speculation": {"method": "copyspek"}}, "speculation.method"),
    ({"speculation": {"method": "draft-model:model=/etc"}}, "speculation.method"),
    ({"speculation": {"method": "copyspec:gamma"}}, "speculation.method"),
    ({"speculation": {"method": "union:parts=copyspec+(draft-model:length=65)"}}, "speculation.method"),
    ({"speculation": {"method": "copyspec", "verifier": "x"}}, "speculation.verifier"),
    ({"speculation": {"budget": -1}}, "speculation.budget"),
    ({"cache": {"keep": "streaming-llm:windows=3"}}, "cache.keep"),
    ({"cache": {"keeps": "none"}}, "cache.keeps"),
    ({"prediction": {"content": 5}}, "prediction.content"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"priority": 1 << 40}, "priority"),
]


@pytest.mark.parametrize(("given", "param"), WRONG, ids=str)
def test_a_wrong_field_is_named(client: openai.OpenAI, given: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="embedded", prompt=CODE, extra_body=given)
    assert (error.value.status_code, error.value.type) == (400, "invalid_request_error")
    assert error.value.param == param
    assert isinstance(error.value.body, dict)
    assert set(error.value.body) == {"message", "type", "param", "code"}
    assert "/" not in str(error.value.body["message"]).replace("name:option", "")


@pytest.mark.parametrize("prompt", [[], "", [[]], [5000], [-1], [["a"]], 5, None, [CODE, ""], {"a": 1}], ids=str)
def test_prompts_that_are_none(client: openai.OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="embedded", prompt=prompt, extra_body={"add_special_tokens": False})


def test_wrong_inputs_of_other_endpoints_are_named(live: Live, client: openai.OpenAI) -> None:
    for given in ([], [5000], [[]], {"a": "b"}):
        with pytest.raises(openai.BadRequestError) as error:
            client.embeddings.create(model="embedded", input=given)  # type: ignore[arg-type]
        assert error.value.param in ("input", None)
    for path, body, param in (
        ("/detokenize", {"tokens": [5000]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": CHAT}, "prompt"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            call(live, path, body)
        assert error.value.param == param
    with pytest.raises(openai.BadRequestError) as error:
        client.embeddings.create(model="embedded", input="x", dimensions=64)
    assert error.value.param == "dimensions"


@pytest.mark.parametrize(
    "messages", [[], [{"role": "user"}, {"role": "robot", "content": "x"}], [{"content": "x"}], "hello", [{"role": "user", "content": 5}]]
)
def test_conversations_that_are_none(client: openai.OpenAI, messages: Any) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, messages)
    assert error.value.param.startswith("messages")


def test_fields_that_this_server_does_not_offer(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "f"}}
    given: list[tuple[str, Any]]
    given = [
        ("functions", [tool]),
        ("tool_choice", "auto"),
        ("modalities", ["audio"]),
        ("store", True),
    ]
    for name, value in given:
        with pytest.raises(openai.BadRequestError) as error:
            chat(client, **{name: value})
        assert error.value.param.startswith(name)


def test_a_model_that_is_not_here(client: openai.OpenAI) -> None:
    for ask in (complete, chat):
        with pytest.raises(openai.NotFoundError) as error:
            ask(client, model="gpt-4")
        assert (error.value.code, error.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="gpt-4", input="x")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="x")  # no such endpoint


@pytest.mark.parametrize("stream", [False, True])
def test_a_step_that_fails_ends_its_request(live: Live, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """The client gets an error without internals. The next request is answered."""
    expected, runner = text(client), live.llm.runner
    forward, calls = runner.forward, 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise RuntimeError("a secret of the inside")
        return forward(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(runner, "forward", failing)
        with pytest.raises(openai.APIError) as error:
            list(complete(client, stream=stream, max_tokens=40))
    assert stream or isinstance(error.value, openai.InternalServerError)
    assert (error.value.type, "secret" in str(error.value)) == ("server_error", False)
    assert text(client) == expected


LONG: dict[str, Any] = {"n": 16, "max_tokens": 450, "ignore_eos": True, "speculation": "off"}


def test_a_client_that_does_not_wait(live: Live) -> None:
    before = live.aborted()
    with live.client(timeout=0.05) as hasty:
        while live.aborted() == before:  # on a busy machine it leaves before its request has arrived
            with pytest.raises(openai.APITimeoutError):
                complete(hasty, **LONG)
            live.settle()


def test_a_client_that_leaves_a_stream(live: Live, client: openai.OpenAI) -> None:
    before = live.aborted()
    stream = complete(client, stream=True, **LONG)
    next(iter(stream))
    stream.close()
    live.settle()
    assert live.aborted() > before


def test_nobody_is_there(live: Live) -> None:
    with openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0) as client, pytest.raises(openai.APIConnectionError):
        complete(client)


# ---- a server with keys, names, a template and little room

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ ending }}{% if add_generation_prompt %}answer:{% endif %}"


@pytest.fixture(scope="module")
def _narrow(llm: LLM) -> Iterator[Live]:
    settings: dict[str, Any] = {"api_key": ("key-a", "key-b"), "served_model_name": ("one", "two/b"), "chat_template": TEMPLATE}
    settings |= {"response_role": "robot", "max_queue": 2, "max_body": 4000, "max_n": 2}
    with Live(llm.sibling(max_seqs=1), **settings) as live:
        yield live


@pytest.fixture
def narrow(_narrow: Live) -> Iterator[Live]:
    yield _narrow
    _narrow.settle()


@pytest.fixture
def keyed(narrow: Live) -> Iterator[openai.OpenAI]:
    with narrow.client(api_key="key-a") as client:
        yield client


def test_keys(narrow: Live, keyed: openai.OpenAI) -> None:
    assert [model.id for model in keyed.models.list()] == ["one", "two/b"]
    for key in ("key-c", "key-", "key-aa", "KEY-A"):
        with narrow.client(api_key=key) as client, pytest.raises(openai.AuthenticationError) as error:
            client.models.list()
        assert (error.value.code, error.value.type) == ("invalid_api_key", "authentication_error")
        assert error.value.response.headers["www-authenticate"] == "Bearer"
        assert "key-" not in str(error.value)
    assert call(narrow, "/health") == {"status": "ok"}  # for monitoring without a key
    with pytest.raises(openai.AuthenticationError):
        call(narrow, "/server_info")


def test_each_key_has_its_own_prefixes(narrow: Live, keyed: openai.OpenAI) -> None:
    call(narrow, "/reset_prefix_cache", {}, api_key="key-a")
    prompt = [(13 * i) % 4000 + 5 for i in range(70)]

    def cached(client: openai.OpenAI, **options: Any) -> int:
        found = complete(client, prompt, model="one", max_tokens=1, **options)
        return int(found.usage.prompt_tokens_details.cached_tokens)

    with narrow.client(api_key="key-b") as other:
        assert [cached(keyed), cached(keyed), cached(other), cached(other), cached(other, cache_salt="x")] == [0, 64, 0, 64, 0]


def test_names_role_and_template(keyed: openai.OpenAI, llm: LLM) -> None:
    reply = chat(keyed, model="two/b", extra={"chat_template_kwargs": {"ending": "In short, "}, "return_token_ids": True})
    assert (reply.model, reply.choices[0].message.role) == ("two/b", "robot")
    prompt = "user: What is a list?\nIn short, answer:"
    assert reply.model_extra["prompt_token_ids"] == llm.tokenizer.encode(prompt, special=False)
    first, *_ = chat(keyed, model="one", stream=True)
    assert first.choices[0].delta.role == "robot"
    assert keyed.models.retrieve("two/b").id == "two/b"
    for name in ("tokenize", "messages", "chat_template", "not a name"):
        with pytest.raises(openai.BadRequestError) as error:
            chat(keyed, model="one", extra={"chat_template_kwargs": {name: "x"}})
        assert error.value.param == "chat_template_kwargs"
    with pytest.raises(openai.BadRequestError, match="at most 2"):
        chat(keyed, model="one", n=3)


def test_a_body_that_is_too_large(keyed: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        complete(keyed, "x" * 5000, model="one")
    assert (error.value.status_code, error.value.type) == (413, "invalid_request_error")


def test_too_many_wait(narrow: Live, keyed: openai.OpenAI) -> None:
    """One runs, two wait, the fourth is refused. All end when their clients leave."""
    asked: Any = {"model": "one", "prompt": CODE, "max_tokens": 450, "n": 2}
    asked["extra_body"] = {"ignore_eos": True, "speculation": "off"}

    async def wait() -> None:
        async with narrow.asynchronous(api_key="key-a") as remote:
            running = await remote.completions.create(stream=True, **asked)
            await anext(aiter(running))
            shell = narrow.service.shell
            waiting = [asyncio.ensure_future(remote.completions.create(**asked)) for _ in range(2)]
            await asyncio.to_thread(soon, lambda: shell.queued == 2)
            with pytest.raises(openai.RateLimitError) as error:
                await asyncio.to_thread(complete, keyed, model="one")
            assert (error.value.status_code, error.value.type) == (429, "rate_limit_error")
            assert 1 <= int(error.value.response.headers["retry-after"]) <= 60
            waiting[0].cancel()
            await asyncio.to_thread(soon, lambda: shell.queued == 1)
            with pytest.raises(openai.RateLimitError):  # there is room for one prompt: all are taken, or none
                await asyncio.to_thread(complete, keyed, [CODE, ADD], model="one")
            assert shell.queued == 1
            waiting[1].cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await running.close()

    asyncio.run(wait())
    narrow.settle()
    assert complete(keyed, model="one").choices[0].finish_reason == "length"


def test_the_urgent_go_first(narrow: Live) -> None:
    """Two requests arrive while the engine is idle, and one can run."""
    shell, go = narrow.service.shell, threading.Event()

    async def race() -> list[int]:
        async with narrow.asynchronous(api_key="key-a") as remote:
            ended: list[int] = []

            async def one(priority: int) -> None:
                extra = {"priority": priority, "ignore_eos": True}
                await remote.completions.create(model="one", prompt=CODE, max_tokens=20, extra_body=extra)
                ended.append(priority)

            resting = asyncio.ensure_future(asyncio.to_thread(narrow.rest, go))
            tasks = []
            for place, priority in enumerate((5, -1), 1):
                tasks.append(asyncio.ensure_future(one(priority)))
                await asyncio.to_thread(soon, lambda place=place: shell.busy == place)
            go.set()
            await asyncio.gather(resting, *tasks)
            return ended

    assert asyncio.run(race()) == [-1, 5]


def test_a_request_that_takes_too_long(llm: LLM, clock: Clock) -> None:
    clock.ahead = 3600.0
    with Live(llm.sibling()) as slow, slow.client() as client:
        with pytest.raises(openai.InternalServerError) as error:
            complete(client, **LONG)
        assert (error.value.status_code, error.value.type) == (504, "timeout_error")
        with pytest.raises(openai.APIError, match="took longer") as later:
            list(complete(client, stream=True, **LONG))
        assert later.value.type == "timeout_error"
        slow.settle()


def test_a_request_that_the_engine_does_not_take_in_time(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(Service, "deadline", property(lambda service: time.monotonic() + 0.3))  # not of the body, which may be late
    with Live(llm.sibling()) as slow, slow.client() as client:
        resting = threading.Thread(target=slow.rest, args=(go,))
        resting.start()
        soon(lambda: slow.service.host.thread.busy > 0)
        try:
            for stream in (False, True):
                with pytest.raises(openai.InternalServerError) as error:
                    complete(client, stream=stream, **LONG)
                assert (error.value.status_code, error.value.type) == (504, "timeout_error")
            assert not slow.service.shell.busy
        finally:
            go.set()
            resting.join()
        slow.settle()


def test_a_stream_with_nothing_to_tell_says_that_it_lives(llm: LLM) -> None:
    """Comments are sent, which clients skip."""
    with Live(llm.sibling(), keep_alive=0.001) as live, live.client() as client:
        with client.completions.with_streaming_response.create(model="embedded", prompt=CODE * 15, max_tokens=3, stream=True) as response:
            lines = list(response.iter_lines())
        assert ": still at work" in lines
        assert len(list(complete(client, CODE * 14, max_tokens=3, stream=True, speculation="off"))) == 3
        live.settle()


def test_a_server_that_ends_says_so(llm: LLM) -> None:
    with Live(llm.sibling()) as live, live.client() as client:
        live.service.shell.draining = True
        with pytest.raises(openai.InternalServerError) as error:
            complete(client)
        assert (error.value.status_code, error.value.response.headers["retry-after"]) == (503, "5")
        live.settle()
