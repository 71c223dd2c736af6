"""Adapters over HTTP: the name of the model chooses one; loading and unloading at run time by the admin key alone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redraft import LLM, SamplingParams
from redraft.errors import InvalidInput
from redraft.models import memory
from redraft.serve.app import app
from redraft.serve.config import ServeConfig
from tests import adapters, checkpoints
from tests.arrays import BACKEND
from tests.serve.raw import Answer, Live, live, post

PROMPT = "the cat sat on the mat and the cat sat on the log"
ADMIN = {"Authorization": "Bearer the-admin-key"}
KEY = {"Authorization": "Bearer a-key"}
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.tiny_llama(tmp_path_factory.mktemp("base") / "own", hidden_size=64, intermediate_size=96)


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the server's adapters, beside one that is none of it."""
    top = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("a/x", "a/y", "a/z", "elsewhere/away")):
        adapters.make(top / name, base, seed=seed)
    (top / "a" / "linked").symlink_to(top / "elsewhere" / "away")
    (top / "a" / "inside").symlink_to(top / "a" / "x")
    (top / "a" / "loop").symlink_to(top / "a" / "loop")
    (top / "a" / "files").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (top / "a" / "files" / file).symlink_to(top / "elsewhere" / "away" / file)
    adapters.make(top / "a" / "half", base)
    (top / "a" / "half" / "adapter_model.safetensors").unlink()
    (top / "a" / "half" / "adapter_model.safetensors").symlink_to(top / "elsewhere" / "away" / "adapter_model.safetensors")
    adapters.make(top / "a" / "dora", base, use_dora=True)
    (top / "a" / "cut").mkdir()
    (top / "a" / "cut" / "adapter_config.json").write_bytes((top / "a" / "x" / "adapter_config.json").read_bytes())
    (top / "a" / "cut" / "adapter_model.safetensors").write_bytes((top / "a" / "x" / "adapter_model.safetensors").read_bytes()[:999])
    adapters.make(top / "a" / "tiny", base)  # a name of the model
    (top / "a" / "file").write_text("no folder")
    return top / "a"


def load(base: Path, **options: Any) -> LLM:
    return LLM(str(base), dtype="float64", backend=BACKEND, cache_memory=1 << 23, draft="copyspec", **options)


@pytest.fixture(scope="module")
def plain(base: Path, folder: Path) -> LLM:
    """For comparisons."""
    return load(base, lora={"x": folder / "x", "y": folder / "y", "z": folder / "z"})


@pytest.fixture(scope="module")
def _server(base: Path, folder: Path) -> Iterator[Live]:
    llm = load(base, lora={"x": folder / "x", "y": folder / "y"})
    settings: dict[str, Any] = {"served_model_name": ("tiny", "same"), "api_key": ("a-key", "b-key")}
    with live(llm, lora_dir=folder, admin_key="the-admin-key", **settings) as made:
        yield made


@pytest.fixture
def server(_server: Live) -> Iterator[Live]:
    """With the adapters x and y, before and after each test."""
    yield _server
    _server.until(lambda: not _server.service.uses)
    _server.idle()
    assert sorted(_server.llm.runner.adapters) == ["x", "y"]


def complete(server: Live, prompt: str, key: dict[str, str] = KEY, **more: Any) -> Answer:
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 24, "ignore_eos": True, **more}
    return server.ask("POST", "/v1/completions", body, **key)


def text(answer: Answer) -> str:
    found = answer.json
    assert answer.status == 200, found
    return str(found["choices"][0]["text"])


def expected(plain: LLM, name: str | None, prompt: str = PROMPT, **fields: Any) -> str:
    given = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, **fields}
    return plain.generate(prompt, lora=name, **given)[0].outputs[0].text


def refused(answer: Answer, status: int, *words: str) -> dict[str, Any]:
    error: dict[str, Any] = answer.json["error"]
    assert answer.status == status, error
    assert all(word in error["message"] for word in words), error
    assert "/" not in error["message"], "a path"
    return error


# ---- the name of the model


def test_the_name_of_the_model_chooses_the_adapter(server: Live, plain: LLM) -> None:
    for model, name in ((None, None), ("tiny", None), ("same", None), ("x", "x"), ("y", "y")):
        more: dict[str, Any] = {} if model is None else {"model": model}
        answer = complete(server, PROMPT, **more)
        found = answer.json
        assert found["model"] == (model or "tiny")
        assert found["choices"][0]["text"] == expected(plain, name)
        assert found["usage"]["completion_tokens"] == 24
        body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 9, **more}
        chat = server.ask("POST", "/v1/chat/completions", body, **KEY).json
        (same,) = plain.chat(body["messages"], temperature=0, max_tokens=9, lora=name)
        assert (chat["model"], chat["choices"][0]["message"]["content"]) == (model or "tiny", same.outputs[0].text)


def test_a_stream_has_the_adapter(server: Live, plain: LLM) -> None:
    *events, done = complete(server, PROMPT, model="y", stream=True, seed=3, temperature=0.8).events()
    assert done == "[DONE]"
    assert {event["model"] for event in events} == {"y"}
    assert "".join(event["choices"][0]["text"] for event in events) == expected(plain, "y", temperature=0.8, seed=3)


def test_embeddings_have_the_adapter(server: Live, plain: LLM) -> None:
    found = {}
    for model, name in (("tiny", None), ("x", "x"), ("y", "y")):
        reply = server.ask("POST", "/v1/embeddings", {"input": PROMPT, "model": model}, **KEY).json
        assert reply["model"] == model
        found[name] = reply["data"][0]["embedding"]
        assert np.allclose(found[name], plain.embed(PROMPT, lora=name)[0], rtol=0, atol=1e-6)
    assert len({str(vector) for vector in found.values()}) == 3


def test_scores_have_the_adapter(server: Live, plain: LLM) -> None:
    tokens = plain.tokenizer.encode(PROMPT)
    for model, name in (("tiny", None), ("x", "x"), ("y", "y")):
        reply = server.ask("POST", "/score", {"text_1": "", "text_2": PROMPT, "model": model}, **KEY).json
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, lora=name)
        entries = plain.generate({"prompt_token_ids": tokens}, params)[0].prompt_logprobs or []
        known = [entry.logprob for entry in entries if entry is not None]
        assert reply["model"] == model and len(known) == len(tokens) - 1
        assert reply["data"][0]["score"] == pytest.approx(sum(known) / len(known), abs=1e-6)


def test_requests_with_and_without_adapters_in_one_batch(server: Live, plain: LLM) -> None:
    asked = [(prompt, name) for prompt in (PROMPT, "def f(x):", "a") for name in (None, "x", "y")] * 2
    with ThreadPoolExecutor(len(asked)) as pool:
        sent = [pool.submit(complete, server, prompt, model=name or "tiny", seed=5, temperature=0.7) for prompt, name in asked]
        found = [text(one.result()) for one in sent]
    assert found == [expected(plain, name, prompt, seed=5, temperature=0.7) for prompt, name in asked]


def test_the_models_are_listed_with_their_parents(server: Live) -> None:
    listed = server.ask("GET", "/v1/models", **KEY).json["data"]
    assert [(one["id"], one["parent"], one["root"]) for one in listed] == [
        ("tiny", None, "tiny"),
        ("same", None, "tiny"),
        ("x", "tiny", "x"),
        ("y", "tiny", "y"),
    ]
    assert server.ask("GET", "/v1/models/x", **KEY).json == listed[2]
    assert server.ask("GET", "/server_info", **KEY).json["adapters"] == ["x", "y"]


def test_an_unknown_name_is_404_and_what_there_is_is_listed(server: Live) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "a"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
        "/v1/embeddings": {"input": "a"},
        "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [5]},
    }
    for path, body in bodies.items():
        answer = server.ask("POST", path, body | {"model": "z"}, **KEY)
        assert answer.status == 404
        assert answer.json["error"] == {
            "message": "no model 'z' here; there is tiny, same, x, y", "type": "not_found_error",
            "param": "model", "code": "model_not_found",
        }  # fmt: skip
        assert server.ask("POST", path, body | {"model": "x"}, **KEY).status == 200


def test_prefixes_are_not_shared(server: Live) -> None:
    long = PROMPT * 2
    server.ask("POST", "/reset_prefix_cache", **KEY)
    counts = []
    for model in ("tiny", "x", "y", "x"):
        usage = complete(server, long, model=model).json["usage"]
        counts.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert counts[:3] == [0, 0, 0]
    assert counts[3] >= 64


@pytest.mark.parametrize("names", [{"served_model_name": ("b", "x")}, {}], ids=["served name", "folder"])
def test_a_name_of_the_model_is_no_adapter_s(names: dict[str, Any], base: Path, folder: Path) -> None:
    llm = load(base, lora={"x" if names else "own": folder / "x"})
    with pytest.raises(InvalidInput, match=r"^ModelConfig\.lora = '\w+': is a name of the model too"):
        app(llm, ServeConfig(**names))


# ---- loading and unloading


def test_load_use_and_unload(server: Live, plain: LLM) -> None:
    answer = server.ask("POST", LOAD, {"lora_name": "z"}, **ADMIN)
    assert answer.status == 200
    loaded = answer.json
    assert (loaded["id"], loaded["parent"], loaded["root"]) == ("z", "tiny", "z")
    assert "z" in [one["id"] for one in server.ask("GET", "/v1/models", **KEY).json["data"]]
    assert text(complete(server, PROMPT, model="z")) == expected(plain, "z")
    refused(server.ask("POST", LOAD, {"lora_name": "z"}, **ADMIN), 400, "an adapter of this name is loaded")
    assert server.ask("POST", UNLOAD, {"lora_name": "z"}, **ADMIN).json == {"id": "z", "object": "model", "deleted": True}
    assert complete(server, PROMPT, model="z").status == 404
    refused(server.ask("POST", UNLOAD, {"lora_name": "z"}, **ADMIN), 404, "no adapter 'z' is loaded")


def test_a_link_within_the_folder_is_followed(server: Live, plain: LLM) -> None:
    assert server.ask("POST", LOAD, {"lora_name": "inside"}, **ADMIN).status == 200
    assert text(complete(server, PROMPT, model="inside")) == expected(plain, "x")
    assert server.ask("POST", UNLOAD, {"lora_name": "inside"}, **ADMIN).status == 200


NAMES = [
    ("", 400), (".", 400), ("..", 400), ("../elsewhere/away", 400), ("/etc", 400), ("a/../x", 400), ("x/", 400), ("x\0", 400), (".x", 400),
    ("x" * 65, 400), ("x y", 400), ("~root", 400), ("%2e%2e", 400), ("..\\elsewhere", 400), ("tiny", 400), ("same", 400),
    ("none", 404), ("linked", 404), ("files", 404), ("half", 404), ("file", 404), ("..away", 400), ("x\n", 400), ("\u202ex", 400),
    ("loop", 404), ("\U0001d400" * 64, 404),
]  # fmt: skip


@pytest.mark.parametrize(("name", "status"), NAMES, ids=[repr(name)[:20] for name, _ in NAMES])
def test_only_subfolders_are_loaded(name: str, status: int, server: Live) -> None:
    answer = server.ask("POST", LOAD, {"lora_name": name}, **ADMIN)
    assert answer.status == status
    error = answer.json["error"]
    assert error["param"] == "lora_name"
    assert "elsewhere" not in error["message"].replace(repr(name), "") and "tmp" not in error["message"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("dora", "adapter_config.json: use_dora = true: DoRA"), ("cut", "adapter_model.safetensors: not a whole safetensors file")],
)
def test_an_adapter_that_cannot_be_applied_leaves_nothing(name: str, message: str, server: Live) -> None:
    for _ in range(2):
        answer = server.ask("POST", LOAD, {"lora_name": name}, **ADMIN)
        assert refused(answer, 400, message)["param"] == "lora_name"
    assert complete(server, "a", model=name).status == 404


def test_an_adapter_that_does_not_fit_leaves_nothing(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(memory, "limits", lambda device: 1 << 10)
        answer = server.ask("POST", LOAD, {"lora_name": "z"}, **ADMIN)
    assert refused(answer, 503, "z: the adapter does not fit: it needs ", ", free 1 KiB")["param"] == "lora_name"
    assert complete(server, "a", model="z").status == 404


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"lora_name": "z", "lora_path": "/tmp/x"}, "lora_path: this server does not support paths from clients"),
        ({"lora_name": "z", "path": "/tmp/x"}, "unknown field 'path'"),
        ({}, "lora_name"),
        ({"lora_name": 3}, "lora_name = 3"),
        ([], "body"),
    ],
    ids=str,
)
def test_a_wrong_body_is_refused_by_field(body: Any, word: str, server: Live) -> None:
    for path in (LOAD, UNLOAD):
        refused(server.ask("POST", path, body, **ADMIN), 400, word)


def test_only_the_admin_key_loads_and_it_does_nothing_else(server: Live) -> None:
    wrong = [
        {},
        KEY,
        {"Authorization": "Bearer the-admin-kez"},
        {"Authorization": "the-admin-key"},
        {"Authorization": "Basic the-admin-key"},
    ]
    for path in (LOAD, UNLOAD):
        for headers in wrong:
            for body in ({"lora_name": "z"}, b"{"):
                answer = server.ask("POST", path, body, **headers)
                refused(answer, 401, "the admin key of this server is needed")
                assert answer.headers["WWW-Authenticate"] == "Bearer"
    for path in ("/v1/models", "/server_info", "/openapi.json", "/load_lora_adapter"):
        assert server.ask("GET", path, **ADMIN).status == 401
    assert complete(server, "a", ADMIN).status == 401
    for path in (f"/{LOAD}", f"{LOAD}/", f"{LOAD}?x=1", "/v1//load_lora_adapter", "/v1/../v1/load_lora_adapter"):
        assert server.ask("POST", path, {"lora_name": "z"}, **KEY).status in (401, 404, 307)
    document = server.ask("GET", "/openapi.json", **KEY).json
    assert document["paths"][LOAD]["post"]["security"] == [{"admin key": []}]
    assert document["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]


@pytest.mark.parametrize("missing", [("lora_dir",), ("admin_key",), ("lora_dir", "admin_key")], ids=" and ".join)
@pytest.mark.parametrize("keys", [(), ("a-key",)], ids=["open", "keys"])
def test_without_both_settings_nothing_is_loaded(missing: tuple[str, ...], keys: tuple[str, ...], plain: LLM, folder: Path) -> None:
    given: dict[str, Any] = {"lora_dir": folder, "admin_key": "the-admin-key"}
    settings = {name: value for name, value in given.items() if name not in missing}
    with live(plain, api_key=keys, **settings) as made:
        for path in (LOAD, UNLOAD):
            for headers in (KEY, ADMIN, {}):
                answer = made.ask("POST", path, {"lora_name": "z"}, **headers)
                assert answer.status == (401 if keys and headers != KEY else 403)
                if answer.status == 403:
                    refused(answer, 403, "--lora-dir and --admin-key")
        assert made.llm.loras == ["x", "y", "z"]


def test_the_admin_key_works_without_other_keys(plain: LLM, folder: Path) -> None:
    with live(plain, lora_dir=folder, admin_key="the-admin-key") as made:
        assert made.ask("GET", "/v1/models").status == 200
        refused(made.ask("POST", UNLOAD, {"lora_name": "z"}), 401, "the admin key")
        assert made.ask("POST", UNLOAD, {"lora_name": "z"}, **ADMIN).status == 200
        assert made.ask("POST", LOAD, {"lora_name": "z"}, **ADMIN).status == 200


class Brake:
    """While it is on, the engine's steps do nothing."""

    def __init__(self, engine: Any) -> None:
        self.on, self.inner = False, engine.step
        engine.step = self._step

    def _step(self) -> Any:
        if self.on:
            time.sleep(0.001)
            return []
        return self.inner()


@pytest.fixture
def brake(server: Live) -> Iterator[Brake]:
    made = Brake(server.llm.engine)
    yield made
    made.on = False
    server.until(lambda: not server.service.shell.busy)
    del server.llm.engine.step


def test_an_unload_waits_for_requests_under_way(server: Live, brake: Brake, plain: LLM, folder: Path) -> None:
    assert server.ask("POST", LOAD, {"lora_name": "z"}, **ADMIN).status == 200
    brake.on = True
    with ThreadPoolExecutor(3) as pool:
        whole = pool.submit(complete, server, PROMPT, model="z")
        server.until(lambda: server.service.shell.busy == 1)
        stream = complete(server, PROMPT, model="z", stream=True)
        server.until(lambda: server.service.shell.busy == 2)
        unload = pool.submit(server.ask, "POST", UNLOAD, {"lora_name": "z"}, **ADMIN)
        server.until(lambda: "z" not in server.llm.loras)
        assert complete(server, PROMPT, model="z").status == 404
        time.sleep(0.1)
        assert not unload.done() and not whole.done()
        # another adapter takes the name meanwhile
        refused(server.ask("POST", UNLOAD, {"lora_name": "z"}, **ADMIN), 404, "no adapter 'z'")
        server.llm.load_lora("z", folder / "x")
        brake.on = False
        assert text(whole.result()) == expected(plain, "z")
        assert "".join(event["choices"][0]["text"] for event in stream.events()[:-1]) == expected(plain, "z")
        assert unload.result().status == 200
    assert text(complete(server, PROMPT, model="z")) == expected(plain, "x")
    assert server.ask("POST", UNLOAD, {"lora_name": "z"}, **ADMIN).status == 200


def test_an_unload_waits_no_longer_than_a_request_may_take(base: Path, folder: Path) -> None:
    llm = load(base, lora={"x": folder / "x"})
    with live(llm, lora_dir=folder, admin_key="the-admin-key", request_timeout=0.3) as made:
        used = llm.runner.adapters["x"]
        made.service.uses[used] += 1  # by a request that does not end
        refused(made.ask("POST", UNLOAD, {"lora_name": "x"}, **ADMIN), 504, "requests still use the adapter; new ones are refused")
        assert made.complete("a", model="x").status == 404


def test_a_client_that_leaves_releases_its_adapter(server: Live, brake: Brake) -> None:
    brake.on = True
    body = {"prompt": PROMPT, "model": "x", "stream": True}
    connection = server.raw(post("/v1/completions", body, "Authorization: Bearer a-key"))
    server.until(lambda: bool(server.service.uses))
    connection.close()
    server.until(lambda: not server.service.uses)


def test_others_continue_while_adapters_come_and_go(server: Live, plain: LLM) -> None:
    """Every text is that of its adapter, or its request got 404 because the adapter was not loaded."""
    texts = {name: expected(plain, name) for name in (None, "x", "y", "z")}
    end = threading.Event()
    failed: list[Any] = []
    counts = dict.fromkeys(texts, 0)

    def ask(name: str | None) -> None:
        body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 24, "ignore_eos": True, "model": name or "tiny"}
        with closing(HTTPConnection("127.0.0.1", server.port, timeout=300)) as one:
            while not end.is_set() and not failed:
                one.request("POST", "/v1/completions", json.dumps(body), KEY)
                answer = one.getresponse()
                found = json.loads(answer.read())
                if answer.status == 200 and found["choices"][0]["text"] == texts[name]:
                    counts[name] += 1
                elif not (answer.status == 404 and name == "z"):
                    failed.append(found)

    threads = [threading.Thread(target=ask, args=(name,)) for name in texts]
    for one in threads:
        one.start()
    for _ in range(6):
        assert server.ask("POST", LOAD, {"lora_name": "z"}, **ADMIN).status == 200
        before = counts["z"]
        server.until(lambda before=before: counts["z"] > before or bool(failed))
        assert server.ask("POST", UNLOAD, {"lora_name": "z"}, **ADMIN).status == 200
    end.set()
    for one in threads:
        one.join()
    assert failed == []
    assert all(counts.values())


def test_two_loads_of_a_name_at_once(server: Live) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = sorted(one.status for one in pool.map(lambda _: server.ask("POST", LOAD, {"lora_name": "z"}, **ADMIN), range(4)))
    assert found == [200, 400, 400, 400]
    assert server.ask("POST", UNLOAD, {"lora_name": "z"}, **ADMIN).status == 200


def test_the_metrics_count_requests_with_adapters(server: Live) -> None:
    def generated() -> float:
        lines = server.ask("GET", "/metrics").body.decode().splitlines()
        (line,) = [line for line in lines if line.startswith("redraft:generation_tokens_total")]
        assert 'model_name="tiny"' in line
        return float(line.split()[-1])

    before = generated()
    assert text(complete(server, "a", model="x"))
    assert generated() == before + 24


# ---- settings


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", 5, ["secret-1"]])
def test_an_admin_key_is_never_reported(key: Any) -> None:
    with pytest.raises(InvalidInput, match=r"^ServeConfig\.admin_key = \(hidden\): "):
        ServeConfig(admin_key=key)
    config = ServeConfig(admin_key="secret-1")
    assert "secret" not in f"{config!r} {config} {config.model_dump()} {config.model_dump_json()} {json.dumps(config.model_dump())}"
    assert config.but(port=1).admin_key == "secret-1"
    with pytest.raises(InvalidInput, match="admin_key is an api_key too") as error:
        ServeConfig(admin_key="secret-1", api_key=("secret-1",))
    assert "secret" not in str(error.value)


def test_the_folder_of_adapters_exists(folder: Path) -> None:
    assert ServeConfig(lora_dir=folder).lora_dir == folder
    for wrong in (folder / "none", folder / "file"):
        with pytest.raises(InvalidInput, match=r"^ServeConfig\.lora_dir = "):
            ServeConfig(lora_dir=wrong)
