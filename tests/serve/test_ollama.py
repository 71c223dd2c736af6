"""Ollama's interface through its official client, and raw where the client does not go."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import httpx
import ollama
import pytest

from redraft import SamplingParams, __version__
from redraft.core.sequence import Request
from redraft.engine.output import Event, Stats
from redraft.llm import LLM
from redraft.models.chat_template import REASONING
from redraft.serve import ollama_documents as documents
from redraft.serve.ollama import _switches
from redraft.serve.ollama_reply import ChatWriter, TextWriter
from redraft.serve.parsers.parser import CallPart, Said
from redraft.serve.reply import Wanted
from redraft.serve.shell import Submission
from tests.serve.live import Live

MESSAGES = [{"role": "user", "content": "What is a list?"}]
CODE = "def add(a, b):\n    "
GREEDY = {"temperature": 0, "num_predict": 24}


@pytest.fixture
def client(live: Live) -> Iterator[ollama.Client]:
    with ollama.Client(host=live.url, timeout=300) as made:
        yield made


def raw(live: Live, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{live.url}{path}", json=body, timeout=300)


def refused(live: Live, path: str, body: Any) -> str:
    answer = raw(live, path, body)
    assert (answer.status_code, list(answer.json())) == (400, ["error"])
    return str(answer.json()["error"])


def alone(llm: LLM, prompt: Any, **params: Any) -> Any:
    return llm.generate(prompt, SamplingParams(**{"temperature": 0, "max_tokens": 24, "draft": "none", **params}))[0]


def words(parts: list[Any]) -> str:
    return "".join(part.message.content for part in parts)


# ---- texts


def test_chat(client: ollama.Client, llm: LLM) -> None:
    reply = client.chat("embedded", MESSAGES, options=GREEDY)
    expected = alone(llm, {"messages": MESSAGES})
    assert (reply.message.role, reply.message.content) == ("assistant", expected.outputs[0].text)
    assert (reply.model, reply.done, reply.done_reason, reply.load_duration) == ("embedded", True, "length", 0)
    assert (reply.prompt_eval_count, reply.eval_count) == (len(expected.prompt_token_ids), 24)
    assert 0 < reply.prompt_eval_duration + reply.eval_duration <= reply.total_duration < 60e9  # type: ignore[operator]
    assert datetime.fromisoformat(str(reply.created_at)).tzinfo is not None


def test_a_stream_of_a_chat_is_the_reply_in_pieces(client: ollama.Client) -> None:
    whole = client.chat("embedded", MESSAGES, options=GREEDY)
    *pieces, last = client.chat("embedded:latest", MESSAGES, options=GREEDY, stream=True)
    assert words(pieces) == whole.message.content
    assert {(piece.model, piece.done, piece.done_reason, piece.eval_count) for piece in pieces} == {("embedded:latest", False, None, None)}
    assert (last.done, last.done_reason, last.message.content) == (True, "length", "")
    assert (last.prompt_eval_count, last.eval_count) == (whole.prompt_eval_count, whole.eval_count)


@pytest.mark.parametrize(("path", "form"), [("/api/chat", documents.OllamaChat), ("/api/generate", documents.OllamaText)])
def test_a_stream_is_the_default_and_each_line_is_an_object(live: Live, path: str, form: Any) -> None:
    body = {"model": "embedded", "messages": MESSAGES} if path == "/api/chat" else {"model": "embedded", "prompt": "hi"}
    answer = raw(live, path, {**body, "options": GREEDY, "logprobs": True, "top_logprobs": 2})
    assert answer.headers["content-type"] == "application/x-ndjson"
    *lines, end = answer.text.split("\n")
    assert end == "" and len(lines) > 1
    for line in lines:
        form.model_validate(json.loads(line), strict=True)


def test_generate_answers_by_the_template(client: ollama.Client) -> None:
    question = client.generate("embedded", "What is a list?", options=GREEDY)
    assert question.response == client.chat("embedded", MESSAGES, options=GREEDY).message.content
    system = client.generate("embedded", "What is a list?", system="Be brief.", options=GREEDY)
    messages = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    assert system.response == client.chat("embedded", messages, options=GREEDY).message.content
    *pieces, last = client.generate("embedded", "What is a list?", options=GREEDY, stream=True)
    assert "".join(str(piece.response) for piece in pieces) == question.response
    assert (last.done, last.response, last.eval_count) == (True, "", question.eval_count)


def test_generate_continues_a_raw_prompt(client: ollama.Client, live: Live, llm: LLM) -> None:
    reply = client.generate("embedded", CODE, raw=True, options=GREEDY)
    assert reply.response == alone(llm, CODE).outputs[0].text
    streamed = client.generate("embedded", CODE, raw=True, options={**GREEDY, "speculation": "off"}, stream=True)
    assert "".join(str(piece.response) for piece in streamed) == reply.response
    assert refused(live, "/api/generate", {"model": "embedded", "prompt": "a", "raw": True, "system": "b"}).startswith("system: ")


def test_the_reply_continues_the_assistants_last_message(client: ollama.Client, llm: LLM) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "A list is"}]
    prompt = llm.tokenizer.render(messages, add_generation_prompt=False, continue_final_message=True)
    expected = alone(llm, llm.tokenizer.encode(prompt, special=False))
    assert client.chat("embedded", messages, options=GREEDY).message.content == expected.outputs[0].text


def test_options(client: ollama.Client, llm: LLM) -> None:
    options = {
        "temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.95, "seed": 7, "num_predict": 20, "stop": ["zzz"],
        "repeat_penalty": 1.1, "repeat_last_n": -1, "presence_penalty": 0.2, "frequency_penalty": 0.1,
    }  # fmt: skip
    params = {name: options[name] for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "stop")}
    expected = alone(llm, CODE, **params, max_tokens=20, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1)
    assert client.generate("embedded", CODE, raw=True, options=options).response == expected.outputs[0].text
    drawn = {"temperature": 1.2, "seed": 7, "mirostat": 2, "mirostat_tau": 2, "mirostat_eta": 0.5}
    expected = alone(llm, CODE, **drawn, max_tokens=20)
    assert client.generate("embedded", CODE, raw=True, options={**drawn, "num_predict": 20}).response == expected.outputs[0].text
    off = {**options, "repeat_last_n": 0}
    expected = alone(llm, CODE, **params, max_tokens=20)
    assert client.generate("embedded", CODE, raw=True, options=off).response == expected.outputs[0].text
    random = [client.generate("embedded", CODE, raw=True, options={**options, "seed": -1, "temperature": 2}).response for _ in range(3)]
    assert len(set(random)) > 1


def test_a_stop_string_and_what_places_a_model(client: ollama.Client) -> None:
    text = str(client.generate("embedded", CODE, raw=True, options=GREEDY).response)
    placed = {
        "num_ctx": 256,
        "num_gpu": 1,
        "num_thread": 2,
        "use_mmap": True,
        "num_keep": 4,
        "mirostat": 0,
        "tfs_z": 1.0,
        "mirostat_tau": 5,
    }
    reply = client.generate("embedded", CODE, raw=True, options={**GREEDY, **placed, "stop": [text[8:11]]}, keep_alive="5m")
    assert (reply.response, reply.done_reason) == (text[: text.index(text[8:11])], "stop")


def test_as_many_tokens_as_there_is_room_for(filling: Live) -> None:
    for number in (None, -1, -2, 0):
        body = {"model": "coder", "prompt": "a" * 200, "raw": True, "stream": False, "options": {"num_predict": number}}
        answer = raw(filling, "/api/generate", body).json()
        assert answer["eval_count"] + answer["prompt_eval_count"] == 256 or answer["done_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_formats(client: ollama.Client, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "maximum": 99}},
        "required": ["age"],
        "additionalProperties": False,
    }
    for form in ("json", schema):
        given: Any = {"format": form, "options": {"temperature": 0, "num_predict": 60}, "stream": stream}
        chat, text = client.chat("embedded", MESSAGES, **given), client.generate("embedded", "give", **given)
        said = words(list(chat)) if stream else chat.message.content
        written = "".join(part.response for part in text) if stream else text.response
        for found in (json.loads(said), json.loads(written)):
            assert isinstance(found, dict) and (form == "json" or found["age"] <= 99)


def test_log_probabilities(client: ollama.Client, llm: LLM) -> None:
    expected = alone(llm, CODE, max_tokens=4, logprobs=2).outputs[0].logprobs
    options = {"temperature": 0, "num_predict": 4}
    whole = client.generate("embedded", CODE, raw=True, options=options, logprobs=True, top_logprobs=2).logprobs
    assert [one.logprob for one in whole or ()] == pytest.approx([one.logprob for one in expected], abs=1e-4)
    assert [len(one.top_logprobs or ()) for one in whole or ()] == [2] * 4
    pieces = list(client.chat("embedded", MESSAGES, options=options, logprobs=True, stream=True))
    assert sum(len(piece.logprobs or ()) for piece in pieces) == 4


def test_a_suffix(filling: Live) -> None:
    expected = filling.llm.fill.tokens("def ", "():")
    with ollama.Client(host=filling.url) as client:
        reply = client.generate("coder", "def ", suffix="():", options={"temperature": 0, "num_predict": 8})
        assert reply.prompt_eval_count == len(expected)
        assert "insert" in (client.show("coder").capabilities or ())


# ---- models


def test_models(client: ollama.Client, live: Live) -> None:
    (model,) = client.list().models
    assert (model.model, model.size) == ("embedded:latest", live.llm.weight_bytes)
    assert model.details is not None and (model.details.family, model.details.parameter_size) == ("llama", "10.2M")
    (running,) = client.ps().models
    assert (running.name, running.size_vram, running.context_length, running.digest) == ("embedded:latest", 0, 512, model.digest)
    shown = client.show("embedded")
    assert shown.template == live.llm.tokenizer.template() and shown.details == model.details
    assert shown.modelinfo is not None and shown.modelinfo["llama.context_length"] == 512
    assert {"completion", "embedding", "tools"} <= set(shown.capabilities or ()) and "insert" not in (shown.capabilities or ())
    assert httpx.get(f"{live.url}/api/version").json() == {"version": __version__}
    assert httpx.head(live.url).status_code == 200  # by which Ollama's program asks for a server


def test_embeddings(client: ollama.Client, llm: LLM) -> None:
    reply = client.embed("embedded", ["a list", "a tuple"])
    for vector, text in zip(reply.embeddings, ("a list", "a tuple"), strict=True):
        assert vector == pytest.approx(llm.embed(text)[0].tolist(), abs=1e-5)
    assert reply.prompt_eval_count == sum(len(llm.tokenizer.encode(text)) for text in ("a list", "a tuple"))
    assert client.embed("embedded", "a list").embeddings == reply.embeddings[:1]


def test_a_request_without_a_prompt_loads(client: ollama.Client) -> None:
    for reply in (client.chat("embedded", []), client.generate("embedded", ""), *client.generate("embedded", "", stream=True)):
        assert (reply.done, reply.done_reason, reply.eval_count) == (True, "load", None)
    with pytest.raises(ollama.ResponseError) as error:
        client.generate("other", "")
    assert error.value.status_code == 404


def test_names_with_and_without_latest(llm: LLM) -> None:
    with Live(llm.sibling(), served_model_name=("a:latest", "b:1", "c")) as live, ollama.Client(host=live.url) as client:
        assert [model.model for model in client.list().models] == ["a:latest", "b:1", "c:latest"]
        for name in ("a", "a:latest", "b:1", "c", "c:latest"):
            assert client.generate(name, "").model == name
        for name in ("b", "b:latest", "c:1"):
            with pytest.raises(ollama.ResponseError) as error:
                client.generate(name, "")
            assert error.value.status_code == 404


def test_keys(llm: LLM) -> None:
    with Live(llm.sibling(), api_key=("secret",)) as live:
        with ollama.Client(host=live.url) as client, pytest.raises(ollama.ResponseError) as error:
            client.list()
        assert error.value.status_code == 401 and error.value.error.startswith("a key of this server is needed")
        with ollama.Client(host=live.url, headers={"Authorization": "Bearer secret"}) as client:
            assert client.list().models


def test_curl_declares_a_form_and_sends_json(live: Live) -> None:
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert httpx.post(f"{live.url}/api/show", content=b'{"model": "embedded"}', headers=headers).status_code == 200
    foreign = {**headers, "origin": "http://other.example"}
    assert httpx.post(f"{live.url}/api/show", content=b'{"model": "embedded"}', headers=foreign).status_code == 403


# ---- what is refused


@pytest.mark.parametrize("name", ["pull", "push", "create", "copy", "embeddings"])
def test_models_are_not_changed(live: Live, name: str) -> None:
    assert refused(live, f"/api/{name}", {"model": "x"}).startswith(f"{name}: this server ")


def test_models_are_not_deleted(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError) as error:
        client.delete("embedded")
    assert error.value.error == "delete: this server deletes no models"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": ["aGk="]}, "images: this server does not support images"),
        ({"template": "{{ .Prompt }}"}, "template: this server does not support templates from clients"),
        ({"context": [1, 2]}, "context: this server does not support context, but messages of /api/chat"),
        ({"suffix": "b"}, "suffix: this model has no tokens that mark the text before and after a gap"),
        ({"think": True}, "think = true: the chat template does not know reasoning"),
        ({"think": "high"}, "think = 'high': the chat template does not know an effort of reasoning"),
        ({"options": {"mirostat": 1}}, "options.mirostat = 1: input should be 0 or 2"),
        ({"options": {"top_q": 2}}, "unknown field 'options.top_q'; did you mean 'top_p'?"),
        ({"options": {"num_ctx": 4096}}, "num_ctx = 4096: the context of this server has 512 tokens"),
        ({"options": {"temperature": -1}}, "options.temperature = -1: input should be greater than or equal to 0"),
        (
            {"options": {"repeat_penalty": 1.1, "repeat_last_n": 64}},
            "options = {'repeat_penalty': 1.1, 'repeat_last_n': 64}: repeat_last_n = 64",
        ),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 300}, "top_logprobs = 300: at most 20 is allowed"),
        ({"format": "yaml"}, "format = 'yaml'"),
        ({"format": {"type": "nothing"}}, "format: #/type: "),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"prompt": "a " * 2000}, "prompt has 20"),
        ({"model": None}, "model: field required"),
    ],
)
def test_what_generate_refuses(live: Live, given: dict[str, Any], message: str) -> None:
    assert refused(live, "/api/generate", {"model": "embedded", "prompt": "a", **given}).startswith(message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"messages": [{"role": "user", "content": "a", "images": ["aGk="]}]}, "messages.0 = "),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role = 'robot'"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}] * 2}, "tools: two have the name a"),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}]},
            "messages.0 = {'role': 'user', 'content': 'a', 'tool_calls': ",
        ),
        ({"stream": "yes"}, "stream = 'yes'"),
    ],
)
def test_what_chat_refuses(live: Live, given: dict[str, Any], message: str) -> None:
    assert refused(live, "/api/chat", {"model": "embedded", "messages": MESSAGES, **given}).startswith(message)


def test_neutral_fields_are_not_refused(live: Live) -> None:
    neutral = {"images": [], "template": "", "context": [], "suffix": "", "system": "", "format": "", "raw": False, "think": False}
    body = {"model": "embedded", "prompt": "a", "stream": False, "options": {"num_predict": 2}, **neutral}
    assert raw(live, "/api/generate", body).status_code == 200


# ---- reasoning and tool calls, whoever parses them


class Calls:
    """A parser that finds reasoning, two calls in pieces, and content, in texts r, a, b, c."""

    def feed(self, text: str) -> Said:
        return {
            "r": Said(reasoning="hm"),
            "a": Said("ok", calls=[CallPart(0, "", "first", "id-0"), CallPart(0, '{"x"')]),
            "b": Said(calls=[CallPart(0, ": 1}"), CallPart(1, "{", "second", "id-1")]),
            "c": Said(calls=[CallPart(1, '"y": 2}')]),
        }.get(text, Said(text))

    def end(self) -> Said:
        return Said()


def events(submission: Submission, *texts: str) -> list[Event]:
    last = len(texts) - 1
    return [Event(submission.request, 0, [5], text, [False], [], "stop" if i == last else None, Stats()) for i, text in enumerate(texts)]  # type: ignore[arg-type]


def write(llm: LLM, kind: Any, *texts: str) -> tuple[Any, list[Any]]:
    """(the whole reply, the lines of the stream)"""
    found: list[Any] = []
    for stream in (False, True):
        submission = Submission(Request("x", [1], SamplingParams()))
        writer = kind("m", Wanted(parser=Calls), llm.tokenizer, [submission], [""])
        lines = [writer.chunk(writer.add(0, event)) for event in events(submission, *texts)]
        found.append([json.loads(line) for part in lines for line in part.splitlines()] if stream else writer.whole())
    return found[0], found[1]


def test_calls_come_whole_with_arguments_as_objects(llm: LLM) -> None:
    whole, lines = write(llm, ChatWriter, "r", "a", "b", "c")
    calls = [
        {"id": "id-0", "function": {"index": 0, "name": "first", "arguments": {"x": 1}}},
        {"id": "id-1", "function": {"index": 1, "name": "second", "arguments": {"y": 2}}},
    ]
    assert whole["message"] == {"role": "assistant", "content": "ok", "thinking": "hm", "tool_calls": calls}
    assert whole["done_reason"] == "stop"
    messages = [line["message"] for line in lines]
    assert [message.get("thinking") for message in messages] == ["hm", None, None, None, None]
    assert [message.get("tool_calls") for message in messages] == [None, None, calls[:1], calls[1:], None]
    for line in (whole, *lines):
        documents.OllamaChat.model_validate(line, strict=True)
        ollama.ChatResponse(**line)


def test_a_call_that_is_cut_off_is_content(llm: LLM) -> None:
    whole, lines = write(llm, ChatWriter, "a")
    assert whole["message"] == {"role": "assistant", "content": 'ok{"x"'}
    assert "".join(line["message"]["content"] for line in lines) == 'ok{"x"'


def test_reasoning_of_generate(llm: LLM) -> None:
    whole, lines = write(llm, TextWriter, "r", "text")
    assert (whole["thinking"], whole["response"]) == ("hm", "text")
    assert [(line.get("thinking"), line["response"], line["done"]) for line in lines] == [
        ("hm", "", False), (None, "text", False), (None, "", True),
    ]  # fmt: skip


def test_an_error_in_a_stream_is_a_line(live: Live) -> None:
    async def broken(*_: Any) -> Any:
        raise RuntimeError("secret")
        yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Submission, "events", broken)
        answer = raw(live, "/api/chat", {"model": "embedded", "messages": MESSAGES, "options": GREEDY})
    assert answer.text == '{"error":"internal error"}\n'
    for submission in list(live.service.shell._submissions.values()):
        live.service.shell.forget(submission)


def test_what_switches_reasoning_in_a_template() -> None:
    assert _switches("{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}") == ["enable_thinking"]
    assert _switches("{% if thinking %}<think>{% endif %}") == ["thinking"]
    assert _switches("{{ message.thinking }}{{ message['thinking'] }}<think>") == []
    assert "thinking" in REASONING


def test_a_client_that_leaves_ends_its_request(live: Live) -> None:
    body = {"model": "embedded", "prompt": CODE, "raw": True, "options": {"num_predict": 400, "temperature": 0}}
    with httpx.stream("POST", f"{live.url}/api/generate", json=body) as answer:
        next(answer.iter_lines())
    live.settle()
