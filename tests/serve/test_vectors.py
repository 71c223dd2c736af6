"""Prompts of vectors over HTTP: npy and safetensors are read, and nothing that may hold code or claims more than it has."""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from redraft import LLM
from redraft.ops.arrays import array
from tests.checkpoints import tiny_llama
from tests.serve.raw import Live, live

PLAIN = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Live]:
    llm = LLM(str(path), dtype="float32", backend="numpy", threads=1, max_model_len=128)
    with live(llm, max_queue=4) as made:
        yield made


@pytest.fixture(scope="module")
def vectors(server: Live) -> np.ndarray[Any, Any]:
    return array(server.llm.runner.weights.embed)[[*range(5, 45)]]


def npy(numbers: Any) -> str:
    file = io.BytesIO()
    np.save(file, np.asarray(numbers))
    return coded(file.getvalue())


def coded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def ask(server: Live, **body: Any) -> Any:
    return server.ask("POST", "/v1/completions", {**PLAIN, **body})


def test_vectors_give_the_text_of_their_tokens(server: Live, vectors: np.ndarray[Any, Any]) -> None:
    wanted = ask(server, prompt=[*range(5, 45)]).json["choices"][0]["text"]
    for given in (npy(vectors), npy(np.asfortranarray(vectors.astype(np.float64))), coded(save({"any": vectors}))):
        for more in ({}, {"prompt": ""}, {"prompt": None}):
            reply = ask(server, prompt_embeds=given, **more).json
            assert reply["choices"][0]["text"] == wanted and reply["usage"]["prompt_tokens"] == 40
    both = ask(server, prompt_embeds=[npy(vectors), npy(vectors * 2)], return_token_ids=True).json["choices"]
    assert both[0]["text"] == wanted != both[1]["text"]
    server.idle()


@pytest.mark.parametrize(
    ("body", "message", "field"),
    [
        ({"prompt_embeds": "#"}, "prompt_embeds: base64 of an npy or a safetensors file is needed", "prompt_embeds"),
        ({"prompt_embeds": []}, "no prompt was given", "prompt_embeds"),
        ({"prompt_embeds": [""] * 5}, "prompt_embeds has 5 prompts: at most 4 are allowed", "prompt_embeds"),
        ({"prompt_embeds": coded(pickle.dumps([1]))}, "prompt_embeds: a file of torch.save or pickle may hold code", "prompt_embeds"),
        ({"prompt_embeds": coded(b"PK\3\4")}, "prompt_embeds: a file of torch.save or pickle may hold code", "prompt_embeds"),
        ({"prompt_embeds": coded(b"x" * 99)}, "prompt_embeds: neither an npy nor a complete safetensors file", "prompt_embeds"),
        (
            {"prompt_embeds": coded(save({"a": np.zeros((1, 2)), "b": np.zeros(1)}))},
            "prompt_embeds: a safetensors file of 2",
            "prompt_embeds",
        ),
        ({"prompt_embeds": npy([[1.0, 2.0]])}, "prompt_embeds has vectors of 2 numbers: this model has", "prompt_embeds"),
        ({"prompt_embeds": npy([[1, 2]])}, "prompt_embeds: numbers of type int64", "prompt_embeds"),
        ({"prompt_embeds": npy([[float("nan")]])}, "prompt_embeds[0] holds NaN or infinity", "prompt_embeds"),
        ({"prompt_embeds": npy([1.0])}, "prompt_embeds of shape [1]", "prompt_embeds"),
        ({"prompt_embeds": npy([[1.0]])[:-4]}, "prompt_embeds: not a complete npy file", "prompt_embeds"),
        ({"prompt_embeds": npy([[1.0]]), "prompt": "a"}, "prompt: prompt_embeds excludes it", "prompt"),
        ({"prompt_embeds": npy([[1.0]]), "echo": True}, "echo: prompt_embeds excludes it", "echo"),
        ({"prompt_embeds": npy([[1.0]]), "suffix": "a"}, "suffix: prompt_embeds excludes it", "suffix"),
        ({}, "prompt: field required", "prompt"),
    ],
)
def test_what_is_refused(server: Live, body: dict[str, Any], message: str, field: str) -> None:
    answer = ask(server, **body)
    error = answer.json["error"]
    assert answer.status == 400 and error["message"].startswith(message) and error["param"] == field, error


def test_objects_and_sizes_that_a_header_only_claims(server: Live) -> None:
    file = io.BytesIO()
    np.save(file, np.array([[None]], dtype=object), allow_pickle=True)
    assert "numbers of type object" in ask(server, prompt_embeds=coded(file.getvalue())).json["error"]["message"]
    small = io.BytesIO()
    np.lib.format.write_array_header_1_0(small, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 20)})
    assert "not a complete npy file" in ask(server, prompt_embeds=coded(small.getvalue() + b"0000")).json["error"]["message"]


def test_log_probabilities_of_a_prompt_of_vectors_are_refused(server: Live, vectors: np.ndarray[Any, Any]) -> None:
    answer = ask(server, prompt_embeds=npy(vectors), prompt_logprobs=1)
    assert answer.status == 400 and "vectors have no log-probabilities" in answer.json["error"]["message"]


# ---- steering


def test_a_server_steers_and_a_request_may_do_without(path: Path, server: Live, tmp_path: Path) -> None:
    from redraft.models.trained import Trained, model_hash

    u = np.random.default_rng(2).standard_normal(server.llm.spec.hidden).astype(np.float32)
    trained = Trained("context-knob", model_hash(server.llm.runner), {"layer": 0, "context": 9.0, "prior": -9.0}, {"u": u})
    file = trained.save(tmp_path / "knob")
    llm = LLM(str(path), dtype="float32", backend="numpy", threads=1, max_model_len=128)
    plain, steered = (llm.generate("abc", **PLAIN, steer=steer)[0].outputs[0].text for steer in (None, f"context-knob:path={file}"))
    assert plain != steered
    with live(llm, steer=f"context-knob:path={file}") as made:
        assert made.alone("abc", max_tokens=8) == steered
        assert made.alone("abc", max_tokens=8, steer="none") == plain
        assert made.alone("abc", max_tokens=8, steer="context-knob:strength=0") == plain
        assert made.ask("GET", "/server_info").json["policies"]["steer"] == "context-knob"


def test_a_request_names_no_file_of_a_vector(server: Live) -> None:
    refused = server.complete("a", steer="context-knob:path=/etc/passwd").json["error"]
    assert refused["param"] == "steer" and "it may name a file" in refused["message"]
    missing = server.complete("a", steer="context-knob").json["error"]
    assert missing["param"] == "steer" and missing["message"].startswith("context-knob: no file (path); ") and "/" not in missing["message"]
    assert server.complete("a", steer="none").status == 200
