"""llama.cpp's interface: texts equal those of the engine alone, and every answer has the documented form."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from redraft import SamplingParams
from redraft.llm import LLM
from redraft.serve import llama_cpp_documents as documents
from tests.serve.live import Live

CODE = "def add(a, b):\n    "
GREEDY = {"temperature": 0, "n_predict": 24}
MESSAGES = [{"role": "user", "content": "What is a list?"}]


def post(live: Live, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{live.url}{path}", json=body, timeout=300)


def complete(live: Live, prompt: Any = CODE, **options: Any) -> Any:
    answer = post(live, "/completion", {"prompt": prompt, **GREEDY, **options})
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(live: Live, path: str, body: Any) -> list[Any]:
    answer = post(live, path, {**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: {") for line in lines)
    return [json.loads(line[6:]) for line in lines]


def refused(live: Live, path: str, body: Any) -> str:
    answer = post(live, path, body)
    assert answer.status_code == 400, answer.text
    documents.LlamaError.model_validate(answer.json())
    assert answer.json()["error"]["code"] == 400
    return str(answer.json()["error"]["message"])


def alone(llm: LLM, prompt: Any = CODE, **params: Any) -> Any:
    return llm.generate(prompt, SamplingParams(**{"temperature": 0, "max_tokens": 24, "draft": "none", **params}))[0]


# ---- completions


@pytest.mark.parametrize("path", ["/completion", "/completions"])
def test_a_completion(live: Live, llm: LLM, path: str) -> None:
    found = post(live, path, {"prompt": CODE, **GREEDY}).json()
    documents.LlamaCompletion.model_validate(found, strict=True)
    expected = alone(llm)
    assert (found["content"], found["tokens"], found["stop"]) == (expected.outputs[0].text, [], True)
    assert (found["stop_type"], found["stopping_word"], found["truncated"], found["has_new_line"]) == ("limit", "", False, True)
    assert (found["tokens_predicted"], found["tokens_evaluated"]) == (24, len(expected.prompt_token_ids))
    assert (found["prompt"], found["model"]) == (f"<s>{CODE}", "embedded")
    assert found["generation_settings"]["n_predict"] == 24 and found["generation_settings"]["temperature"] == 0


def test_a_stream_is_the_text_in_pieces(live: Live) -> None:
    whole = complete(live, return_tokens=True)
    *pieces, last = streamed(live, "/completion", {"prompt": CODE, **GREEDY, "timings_per_token": True, "n_probs": 1})
    assert "".join(piece["content"] for piece in pieces) == whole["content"]
    assert [token for piece in pieces for token in piece["tokens"]] == whole["tokens"]
    for piece in pieces:
        documents.LlamaPiece.model_validate(piece, strict=True)
        assert not piece["stop"] and piece["timings"]["predicted_n"] == piece["tokens_predicted"]
    documents.LlamaCompletion.model_validate(last, strict=True)
    assert (last["stop"], last["content"], last["tokens"], last["tokens_predicted"]) == (True, "", [], 24)
    assert last["generation_settings"]["stream"] is True


def test_prompts_of_texts_and_tokens(live: Live, llm: LLM) -> None:
    bos, *ids = llm.tokenizer.encode(CODE)
    middle = llm.tokenizer.encode("abc", special=False)
    for prompt, tokens in (
        (CODE, [bos, *ids]),
        ({"prompt_string": CODE}, [bos, *ids]),
        ([bos, *ids], [bos, *ids]),
        ([5, "abc", 7], [5, *middle, 7]),
        (["abc", 7], [bos, *middle, 7]),
    ):
        assert complete(live, prompt)["content"] == alone(llm, tokens).outputs[0].text


def test_several_prompts_and_texts(live: Live) -> None:
    prompts = [CODE, [5, 6], [7, "abc"], {"prompt_string": "x"}]
    found = complete(live, prompts, n_cmpl=2, temperature=1, seed=3)
    assert [one["index"] for one in found] == list(range(8))
    assert [one["tokens_evaluated"] for one in found[2:4]] == [2, 2]
    events = streamed(live, "/completion", {"prompt": prompts, **GREEDY, "n_cmpl": 2, "temperature": 1, "seed": 3})
    for one in found:
        own = [event for event in events if event["index"] == one["index"]]
        assert "".join(event["content"] for event in own) == one["content"]
        assert [event["stop"] for event in own] == [False] * (len(own) - 1) + [True]


def test_sampling(live: Live, llm: LLM) -> None:
    given = {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.95, "seed": 7, "presence_penalty": 0.2}
    expected = alone(llm, **given, frequency_penalty=0.1, repetition_penalty=1.1).outputs[0].text
    assert complete(live, **given, frequency_penalty=0.1, repeat_penalty=1.1, repeat_last_n=-1)["content"] == expected
    without = {name: value for name, value in given.items() if name != "presence_penalty"}
    assert complete(live, **given, repeat_penalty=1.1, repeat_last_n=0)["content"] == alone(llm, **without).outputs[0].text
    named = alone(llm, temperature=1, top_k=30, seed=7).outputs[0].text
    assert complete(live, **given, repeat_penalty=1.1, samplers=["top_k", "infill"])["content"] == named


SAMPLERS: list[dict[str, Any]] = [
    {
        "temperature": 0.2,
        "dry_multiplier": 2.0,
        "dry_base": 1.5,
        "dry_allowed_length": 1,
        "dry_penalty_last_n": 40,
        "dry_sequence_breakers": ["zz"],
    },
    {"xtc_probability": 0.9, "xtc_threshold": 0.05},
    {"top_n_sigma": 0.7},
    {"dynatemp_range": 0.8, "dynatemp_exponent": 0.5},
    {"mirostat": 2, "mirostat_tau": 2.0, "mirostat_eta": 0.5},
]


@pytest.mark.parametrize("given", SAMPLERS, ids=lambda given: [*given][-1])
def test_samplers_by_llama_cpps_names(live: Live, llm: LLM, given: dict[str, Any]) -> None:
    given = {"temperature": 1.2, "seed": 7, **given}
    expected, plain = alone(llm, **given).outputs[0].text, alone(llm, temperature=given["temperature"], seed=7).outputs[0].text
    found = complete(live, **given)
    assert found["content"] == expected != plain
    assert {name: found["generation_settings"][name] for name in given} == given
    if "mirostat" in given:
        others = {"top_k": 1, "presence_penalty": 2, "dynatemp_range": 1, "samplers": ["top_k"]}
        assert complete(live, **given, **others)["content"] == expected, "temperature alone acts beside it"
    else:
        assert complete(live, **given, samplers=["temperature"] if "dynatemp_range" not in given else [])["content"] != expected


def test_a_seed_that_is_reported_gives_the_text_again(live: Live) -> None:
    first = complete(live, temperature=1, seed=-1)
    assert complete(live, temperature=1, seed=first["generation_settings"]["seed"])["content"] == first["content"]


def test_how_texts_end(live: Live, llm: LLM) -> None:
    text = complete(live)["content"]
    word = complete(live, stop=["zzz", text[8:11]])
    assert (word["content"], word["stop_type"], word["stopping_word"]) == (text[: text.index(text[8:11])], "word", text[8:11])
    eos = llm.tokenizer.vocabulary.id("eos_token")
    ended = complete(live, logit_bias=[[eos, 100.0]], n_predict=5)
    assert (ended["content"], ended["stop_type"], ended["tokens_predicted"]) == ("", "eos", 1)
    assert complete(live, logit_bias=[[eos, 100.0]], n_predict=5, ignore_eos=True)["stop_type"] == "limit"
    full = complete(live, n_predict=-1, ignore_eos=True)
    assert full["truncated"] and full["tokens_predicted"] + full["tokens_evaluated"] == 512


def test_no_new_tokens(live: Live) -> None:
    found = complete(live, n_predict=0)
    assert (found["content"], found["tokens_predicted"], found["stop_type"]) == ("", 0, "limit")
    assert found["generation_settings"]["n_predict"] == 0 and found["tokens_evaluated"] == 9
    (last,) = streamed(live, "/completion", {"prompt": CODE, "n_predict": 0})
    assert last["stop"]


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ({"grammar": 'root ::= "yes" | "no"'}, {"yes", "no"}),
        ({"json_schema": {"enum": [1, 2]}}, {"1", "2"}),
    ],
)
def test_grammars(live: Live, given: dict[str, Any], texts: set[str]) -> None:
    assert {complete(live, **given, temperature=1, seed=seed)["content"] for seed in range(4)} <= texts


def test_biases(live: Live, llm: LLM) -> None:
    (token,) = llm.tokenizer.encode(" return", special=False)
    assert complete(live, n_predict=1)["content"] == " return"
    expected = alone(llm, max_tokens=4, logit_bias={token: -float("inf"), 5: 1.5}).outputs[0].text
    for bias in ([[token, False], [5, 1.5]], [[" return", False], [5, 1.5]], {str(token): False, "5": 1.5}, {" return": False, "5": 1.5}):
        assert complete(live, n_predict=4, logit_bias=bias)["content"] == expected


def test_probabilities(live: Live, llm: LLM) -> None:
    expected = alone(llm, max_tokens=4, logprobs=2).outputs[0]
    found = complete(live, n_predict=4, n_probs=2)["completion_probabilities"]
    assert [one["id"] for one in found] == expected.token_ids
    assert [one["logprob"] for one in found] == pytest.approx([one.logprob for one in expected.logprobs], abs=1e-4)
    for one, entry in zip(found, expected.logprobs, strict=True):
        assert [top["id"] for top in one["top_logprobs"]] == [token for token, _ in entry.top[:2]]
        assert bytes(one["bytes"]).decode() == one["token"]
    assert "completion_probabilities" not in complete(live, n_predict=4)


def test_timings_and_drafts(live: Live) -> None:
    prompt = CODE * 6
    timings = complete(live, prompt, n_predict=48)["timings"]
    assert timings["predicted_n"] == 48 and 0 <= timings["draft_n_accepted"] <= timings["draft_n"] and timings["draft_n"] > 0
    assert timings["predicted_per_second"] == pytest.approx(48e3 / timings["predicted_ms"], rel=1e-2)
    again = complete(live, prompt, n_predict=48)
    assert again["timings"]["cache_n"] == again["tokens_cached"] > 0
    assert again["timings"]["cache_n"] + again["timings"]["prompt_n"] == again["tokens_evaluated"]
    assert "draft_n" not in complete(live, prompt, speculation="off")["timings"]


def test_chosen_fields(live: Live) -> None:
    found = complete(live, response_fields=["content", "timings/predicted_n", "generation_settings/seed", "nothing", "content/x"])
    assert list(found) == ["content", "timings/predicted_n", "generation_settings/seed"] and found["timings/predicted_n"] == 24
    *_, last = streamed(live, "/completion", {"prompt": CODE, **GREEDY, "response_fields": ["stop_type"]})
    assert last == {"stop_type": "limit"}


# ---- filling in the middle


def test_infill(filling: Live) -> None:
    llm = filling.llm
    body = {"input_prefix": "def ", "input_suffix": "():\n", "prompt": "a", "temperature": 0, "n_predict": 8}
    found = post(filling, "/infill", body).json()
    documents.LlamaCompletion.model_validate(found, strict=True)
    ids = llm.fill.tokens("def a", "():\n")
    assert found["prompt"] == llm.tokenizer.decode_all(ids)
    assert found["content"] == alone(llm, {"prompt": "def a", "suffix": "():\n"}, max_tokens=8).outputs[0].text
    assert "".join(event["content"] for event in streamed(filling, "/infill", body)) == found["content"]


def test_infill_as_editors_ask_for_it(filling: Live) -> None:
    extra = [{"filename": "a.py", "text": "x = 1\n", "time": 12.5}, {"filename": "b.py", "text": "y = 2\n"}]
    body = {
        "input_prefix": "def f():\n", "input_suffix": "\n", "prompt": "    return ", "input_extra": extra, "id_slot": 0, "n_predict": 4,
        "n_indent": 4, "top_k": 40, "top_p": 0.9, "samplers": ["top_k", "top_p", "infill"], "stream": False, "cache_prompt": True,
        "t_max_prompt_ms": 500, "t_max_predict_ms": 1000, "response_fields": ["content", "timings/prompt_n", "truncated", "tokens_cached"],
    }  # fmt: skip
    assert list(post(filling, "/infill", body).json()) == ["content", "timings/prompt_n", "truncated", "tokens_cached"]
    found = post(filling, "/infill", {**body, "response_fields": None, "n_predict": 0}).json()
    assert "<file_sep>a.py\nx = 1\n<file_sep>b.py\ny = 2\n" in found["prompt"] and found["content"] == ""


def test_a_filled_text_ends_before_a_mark(filling: Live) -> None:
    mark = filling.llm.tokenizer.vocabulary.ids()["<fim_prefix>"]
    body = {"input_prefix": "def ", "input_suffix": "():\n", "n_predict": 8, "logit_bias": [[mark, 100.0]]}
    found = post(filling, "/infill", body).json()
    assert (found["content"], found["stop_type"], found["tokens_predicted"]) == ("", "eos", 1)
    assert complete(filling, "def ", n_predict=8, logit_bias=[[mark, 100.0]])["stop_type"] == "limit"


def test_other_files_give_way(filling: Live) -> None:
    extra = [{"filename": name, "text": name * 100} for name in "abc"]
    body = {"input_prefix": "x" * 30, "input_suffix": "y", "input_extra": extra, "n_predict": 10}
    found = post(filling, "/infill", body).json()
    assert "c" * 100 in found["prompt"] and "a" * 100 not in found["prompt"]
    assert found["tokens_evaluated"] <= 256 - 10


def test_a_suffix_of_openais_completions(filling: Live) -> None:
    body = {"prompt": ["def ", "class "], "suffix": "():\n", "temperature": 0, "max_tokens": 8, "return_token_ids": True}
    choices = post(filling, "/v1/completions", body).json()["choices"]
    for choice, prompt in zip(choices, body["prompt"], strict=True):  # type: ignore[arg-type]
        assert choice["prompt_token_ids"] == filling.llm.fill.tokens(prompt, "():\n")
    plain = post(filling, "/v1/completions", {**body, "suffix": ""}).json()["choices"][0]
    assert plain["prompt_token_ids"] == filling.llm.tokenizer.encode("def ")
    for given, named in (({"echo": True}, "echo"), ({"prompt": [1, 2]}, "suffix")):
        answer = post(filling, "/v1/completions", {**body, **given})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, named)


def test_a_model_without_marks(live: Live) -> None:
    lacks = "this model has no tokens that mark the text before and after a gap"
    assert refused(live, "/infill", {"input_prefix": "a", "input_suffix": "b"}) == f"input_suffix: {lacks}"
    error = post(live, "/v1/completions", {"prompt": "a", "suffix": "b"}).json()["error"]
    assert (error["message"], error["param"]) == (f"suffix: {lacks}", "suffix")


# ---- others


def test_props(live: Live, llm: LLM) -> None:
    found = httpx.get(f"{live.url}/props").json()
    documents.LlamaProps.model_validate(found, strict=True)
    assert (found["default_generation_settings"]["n_ctx"], found["model_path"], found["bos_token"]) == (512, "embedded", "<s>")
    assert found["chat_template"] == llm.tokenizer.template() and found["default_generation_settings"]["params"]["temperature"] == 0.5


def test_a_template_is_applied(live: Live, llm: LLM) -> None:
    assert post(live, "/apply-template", {"messages": MESSAGES}).json() == {"prompt": llm.tokenizer.render(MESSAGES)}
    assert refused(live, "/apply-template", {"messages": []}).startswith("messages = ")


def test_tokens_in_both_forms(live: Live, llm: LLM) -> None:
    ids = llm.tokenizer.encode("hé", special=False)
    assert post(live, "/tokenize", {"content": "hé"}).json()["tokens"] == ids
    assert post(live, "/tokenize", {"content": "hé", "add_special": True}).json()["tokens"] == llm.tokenizer.encode("hé")
    pieces = post(live, "/tokenize", {"content": "hé", "with_pieces": True}).json()["tokens"]
    assert [piece["id"] for piece in pieces] == ids and [195] in [piece["piece"] for piece in pieces] and pieces[0]["piece"] == "h"
    assert post(live, "/detokenize", {"tokens": ids}).json() == {"prompt": "hé", "content": "hé"}
    answer = post(live, "/tokenize", {"content": "a", "prompt": "a"})
    assert answer.json()["error"]["message"] == "one of prompt, messages and content is needed"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": None}, "prompt: field required"),
        ({"prompt": []}, "no prompt was given"),
        ({"prompt": [1, [2]]}, "prompt: a list of tokens holds texts and tokens only"),
        ({"prompt": [1 << 20]}, "token 1048576: not in 0..4095"),
        ({"prompt": {"prompt_string": "a", "multimodal_data": ["aGk="]}}, "prompt = "),
        ({"mirostat": 1}, "mirostat = 1: input should be 0 or 2"),
        ({"dry_base": 0.5}, "dry_base = 0.5: input should be greater than or equal to 1"),
        ({"dry_sequence_breakers": [""]}, "dry_sequence_breakers.0 = ''"),
        ({"adaptive_target": 0.5}, "adaptive_target: this server does not support adaptive sampling"),
        ({"post_sampling_probs": True}, "post_sampling_probs: this server does not support probabilities after sampling"),
        ({"lora": [{"id": 0, "scale": 0.5}]}, "lora: this server does not support scales of adapters, but model"),
        ({"samplers": ["nothing"]}, "samplers.0 = 'nothing'"),
        ({"repeat_penalty": 1.1, "repeat_last_n": 64}, "repeat_last_n = 64: penalties see the whole text here; give -1, or 0 for none"),
        ({"grammar": "x", "json_schema": {}}, "grammar: it and json_schema exclude each other"),
        ({"grammar": "root ::= ("}, "grammar = 'root ::= ('"),
        ({"json_schema": {"type": "nothing"}}, "json_schema: #/type: "),
        ({"n_probs": 300}, "n_probs = 300: at most 20 is allowed"),
        ({"n_cmpl": 300}, "n_cmpl = 300: at most "),
        ({"logit_bias": [[1 << 20, 1.0]]}, "logit_bias: token 1048576 is not in 0..4095"),
        ({"logit_bias": [[1]]}, "logit_bias.0"),
        ({"n_predict": -2}, "n_predict = -2"),
        ({"n_predictt": 3}, "unknown field 'n_predictt'; did you mean 'n_predict'?"),
    ],
)  # fmt: skip
def test_what_is_refused(live: Live, given: dict[str, Any], message: str) -> None:
    assert refused(live, "/completion", {"prompt": "a", **given}).startswith(message)


def test_samplers_that_are_off(live: Live, llm: LLM) -> None:
    off = {
        "mirostat": 0,
        "mirostat_tau": 5.0,
        "dry_multiplier": 0.0,
        "dry_base": 1.75,
        "dry_sequence_breakers": ["\n"],
        "xtc_probability": 0,
    }
    off |= {"xtc_threshold": 0.1, "dynatemp_range": 0.0, "dynatemp_exponent": 1.0, "top_n_sigma": -1.0, "min_keep": 0, "lora": []}
    assert complete(live, **off, n_cache_reuse=0, n_keep=0, id_slot=-1)["content"] == alone(llm).outputs[0].text


def test_other_errors(live: Live) -> None:
    long = post(live, "/completion", {"prompt": "a " * 2000}).json()["error"]
    assert (long["code"], long["type"]) == (400, "exceed_context_size_error")
    other = post(live, "/completion", {"prompt": "a", "model": "other"})
    assert (other.status_code, other.json()["error"]["type"]) == (404, "not_found_error")
    assert httpx.get(f"{live.url}/completion").json()["error"]["code"] == 405
