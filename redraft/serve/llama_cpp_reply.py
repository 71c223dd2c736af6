"""Replies in the form of llama.cpp's own completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from redraft.config import SamplingParams
from redraft.serve.errors import TYPES, Refused, clean
from redraft.serve.llama_cpp_schema import Options
from redraft.serve.llama_options import SAMPLERS
from redraft.serve.reply import Choice, Writer, event, finite

SAME = (  # names of fields
    "top_n_sigma", "xtc_probability", "xtc_threshold", "dynatemp_range", "dynatemp_exponent", "mirostat", "mirostat_tau", "mirostat_eta",
    "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n",
)  # fmt: skip
ORDER = ["penalties", "dry", "temperature", "top_n_sigma", "top_k", "top_p", "min_p", "typ_p", "xtc"]  # of Redraft's samplers
assert set(ORDER) <= set(SAMPLERS)


def error_body(error: Refused) -> dict[str, Any]:
    kind = {400: "invalid_request_error", 503: "unavailable_error"}.get(error.status, TYPES[error.status])
    kind = "exceed_context_size_error" if error.code == "context_length_exceeded" else kind
    return {"error": {"code": error.status, "message": clean(error.message), "type": kind}}


def settings(params: SamplingParams, context: int, *, stream: bool = False) -> dict[str, Any]:
    """What a text is sampled by. context: tokens of prompt and text at most."""
    new = -1 if params.max_tokens is None else params.max_tokens
    grammar = params.structured_outputs
    return {
        "n_ctx": context,
        "n_predict": new,
        "max_tokens": new,
        "seed": params.seed,
        "temperature": params.temperature,
        "top_k": max(0, params.top_k),
        "top_p": params.top_p,
        "min_p": params.min_p,
        "typical_p": params.typical_p,
        "repeat_penalty": params.repetition_penalty,
        "repeat_last_n": -1,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "ignore_eos": params.ignore_eos,
        "stop": list(params.stop),
        "stream": stream,
        "n_probs": params.logprobs or 0,
        "grammar": grammar.text if grammar is not None and grammar.kind == "grammar" else "",
        **{name: getattr(params, name) for name in SAME},
        "dry_sequence_breakers": list(params.dry_sequence_breakers),
        "samplers": ORDER,
    }


@dataclass(frozen=True)
class Asked:
    """Of the request: its body, the tokens that a context holds, and what the reply calls the model."""

    body: Options
    context: int
    model: str


class LlamaWriter(Writer):
    def __init__(self, asked: Asked, *given: Any) -> None:
        super().__init__(*given)
        self.asked = asked

    def whole(self) -> Any:
        """One text as an object, several as a list."""
        found = [self._selected(self._piece(choice, stop=True) | self._end(choice)) for choice in self.choices]
        return found[0] if len(found) == 1 else found

    def chunk(self, new: Choice) -> bytes:
        sent = b""
        if new.text or new.tokens:
            sent = event(self._piece(new, stop=False) | self._timed(new.index))
        if new.reason is not None:
            last = Choice(new.index)
            sent += event(self._selected(self._piece(last, stop=True) | self._end(self.choices[new.index])))
        return sent

    def finish(self) -> bytes:
        return b""

    def failed(self, error: Refused) -> bytes:
        return event(error_body(error))

    def _piece(self, new: Choice, *, stop: bool) -> dict[str, Any]:
        body = self.asked.body
        found = {
            "index": new.index,
            "content": new.text,
            "tokens": new.tokens if body.stream or body.return_tokens else [],
            "stop": stop,
            "tokens_predicted": len(self.choices[new.index].tokens),
            "tokens_evaluated": len(self._request(new.index).prompt),
        }
        return found | ({"completion_probabilities": self._probabilities(new)} if body.n_probs and new.logprobs else {})

    def _end(self, choice: Choice) -> dict[str, Any]:
        request = self._request(choice.index)
        length, full = choice.reason == "length", len(request.prompt) + len(choice.tokens) >= self.asked.context
        sampled = settings(request.params, self.asked.context, stream=bool(self.asked.body.stream))
        return {
            "model": self.asked.model,
            "generation_settings": sampled | ({"n_predict": 0, "max_tokens": 0} if self.wanted.drop else {}),
            "prompt": self.tokenizer.decode_all(request.prompt),
            "has_new_line": "\n" in choice.text,
            "truncated": length and full and len(choice.tokens) != request.params.max_tokens,
            "stop_type": "limit" if length else "eos" if choice.stop is None else "word",
            "stopping_word": choice.stop or "",
            "tokens_cached": request.cached_tokens or 0,
            "timings": self._timings(choice.index),
        }

    def _selected(self, found: dict[str, Any]) -> dict[str, Any]:
        """The fields that the request wants."""
        wanted = self.asked.body.response_fields
        if not wanted:
            return found
        chosen = {}
        for name in wanted:
            value: Any = found
            for part in name.split("/"):
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None:
                chosen[name] = value
        return chosen

    def _timed(self, index: int) -> dict[str, Any]:
        return {"timings": self._timings(index)} if self.asked.body.timings_per_token else {}

    def _timings(self, index: int) -> dict[str, Any]:
        request, choice = self._request(index), self.choices[index]
        cached, (_, prompt, text) = request.cached_tokens or 0, self.durations(index)
        found = {"cache_n": cached} | _speed("prompt", len(request.prompt) - cached, prompt) | _speed("predicted", len(choice.tokens), text)
        drafted = {"draft_n": choice.stats.drafted, "draft_n_accepted": choice.stats.accepted}
        return found | (drafted if choice.stats.drafted else {})

    def _probabilities(self, new: Choice) -> list[dict[str, Any]]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            raw = self.tokenizer.bytes_of(token)
            return {"id": token, "token": raw.decode("utf-8", "replace"), "bytes": list(raw), "logprob": finite(logprob)}

        count = self.wanted.logprobs or 0
        return [entry(one.token, one.logprob) | {"top_logprobs": [entry(*pair) for pair in one.top[:count]]} for one in new.logprobs]

    def _request(self, index: int) -> Any:
        return self.submissions[index // self.n].request


def _speed(name: str, count: int, seconds: float) -> dict[str, Any]:
    return {
        f"{name}_n": count,
        f"{name}_ms": round(seconds * 1e3, 3),
        f"{name}_per_token_ms": round(seconds * 1e3 / count, 3) if count else 0.0,
        f"{name}_per_second": round(count / seconds, 3) if seconds else 0.0,
    }
