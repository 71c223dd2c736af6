"""generation_config.json: every field of transformers' GenerationConfig is applied, refused by name, or known to change no text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import transformers

from redraft import LLM, SamplingParams
from redraft.errors import CheckpointError, Unsupported
from redraft.models import generation
from redraft.models.generation import read_defaults, read_eos
from tests.checkpoints import tiny_llama
from tests.models import tiny

VOCAB = 61


def defaults(folder: Path, **fields: Any) -> dict[str, Any]:
    tiny.edit(folder, generation.FILE, **fields)
    return read_defaults(folder, (2,), VOCAB)


APPLIED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sampling": (
        {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "typical_p": 0.8, "repetition_penalty": 1.1},
        {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "typical_p": 0.8, "repetition_penalty": 1.1},
    ),
    "greedy": ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
    "top_p 0": ({"top_p": 0, "do_sample": True}, {"top_k": 1}),
    "top_p 0.0": ({"top_p": 0.0, "top_k": 30}, {"top_k": 1}),
    "least length": ({"min_new_tokens": 5}, {"min_tokens": 5}),
    "most length": ({"max_new_tokens": 7, "max_length": 3}, {"max_tokens": 7}),
    "stop string": ({"stop_strings": "END"}, {"stop": "END"}),
    "stop strings": ({"stop_strings": ["a", "b"]}, {"stop": ["a", "b"]}),
    "suppressed tokens": ({"suppress_tokens": [3, 7]}, {"logit_bias": {3: -math.inf, 7: -math.inf}}),
    "bad tokens": ({"bad_words_ids": [[3], [2], [9]]}, {"logit_bias": {3: -math.inf, 9: -math.inf}}),  # transformers does not ban [eos]
    "biased tokens": ({"sequence_bias": [[[4], 1.5]], "suppress_tokens": [5]}, {"logit_bias": {4: 1.5, 5: -math.inf}}),
}


@pytest.mark.parametrize("case", APPLIED)
def test_heeded(case: str, tmp_path: Path) -> None:
    fields, expected = APPLIED[case]
    assert defaults(tmp_path, **fields) == expected


REFUSED: dict[str, Any] = {
    "num_beams": 4, "num_beam_groups": 2, "constraints": ["x"], "force_words_ids": [[1]], "penalty_alpha": 0.6, "dola_layers": "high",
    "guidance_scale": 1.5, "no_repeat_ngram_size": 3, "encoder_repetition_penalty": 1.2, "encoder_no_repeat_ngram_size": 3, "min_length": 9,
    "forced_bos_token_id": 0, "forced_eos_token_id": 2, "exponential_decay_length_penalty": [10, 1.1], "begin_suppress_tokens": [4],
    "watermarking_config": {"bias": 2.0}, "token_healing": True, "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4, "top_h": 0.4,
    "bad_words_ids": [[3], [4, 5]], "sequence_bias": [[[4, 5], 1.5]],
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_with_a_way_to_go_on(name: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=rf"generation_config.json: {name} = .* is not supported; .*generation_config='none'") as caught:
        defaults(tmp_path, **{name: REFUSED[name]})
    assert "\n" not in str(caught.value)


NEUTRAL: dict[str, Any] = {
    "num_beams": 1, "num_beam_groups": 1, "constraints": None, "force_words_ids": [], "penalty_alpha": 0.0, "guidance_scale": 1.0,
    "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "min_length": 0,
    "forced_bos_token_id": None, "exponential_decay_length_penalty": None, "begin_suppress_tokens": [], "token_healing": False,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None, "bad_words_ids": [], "sequence_bias": None, "suppress_tokens": [],
    "length_penalty": 0.5, "early_stopping": True, "diversity_penalty": 0.0,
}  # fmt: skip


def test_neutral_values_count_as_not_given(tmp_path: Path) -> None:
    assert defaults(tmp_path, **NEUTRAL) == {}
    own = {name: value for name, value in transformers.GenerationConfig._get_default_generation_params().items() if name != "top_k"}
    tiny.edit(tmp_path, generation.FILE, **own)
    found = read_defaults(tmp_path, (2,), VOCAB)
    assert found == {"temperature": 0.0, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0}, "do_sample is false there"


def test_filters_of_sampling_change_no_greedy_text(tmp_path: Path) -> None:
    assert defaults(tmp_path, do_sample=False, epsilon_cutoff=3e-4, top_h=0.4) == {"temperature": 0.0}
    assert defaults(tmp_path, do_sample=True, epsilon_cutoff=None, top_h=None, penalty_alpha=0.6) == {}


# Fields that change no text, or that belong to the caller: limits, what is returned, the kind of cache, drafting.
LEFT_OUT = {
    "max_length", "max_time", "early_stopping", "length_penalty", "diversity_penalty", "do_sample", "use_mtp",
    "use_cache", "prefill_chunk_size", "cache_implementation", "cache_config", "max_cache_len", "renormalize_logits",
    "remove_invalid_values", "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "is_assistant",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "prompt_lookup_num_tokens",
    "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
    "speculation_type", "compile_config", "disable_compile", "continuous_batching_config", "low_memory", "transformers_version",
}  # fmt: skip


def test_no_field_of_transformers_is_forgotten() -> None:
    """A field that a later version adds fails here until it is sorted in."""
    fields = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    known = LEFT_OUT | set(REFUSED) | {name for given, _ in APPLIED.values() for name in given}
    assert fields - known == set()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"top_p": 1.5}, "SamplingParams.top_p = 1.5"),
        ({"no_repeat_ngram_size": "many"}, "no_repeat_ngram_size = 'many': not a number"),
        ({"suppress_tokens": [999]}, "suppress_tokens: 999 is not a token id in 0..60"),
        ({"sequence_bias": {"a": 1}}, r"sequence_bias = \{'a': 1\}"),
        ({"max_new_tokens": 0}, "SamplingParams.max_tokens = 0"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "min_tokens = 4 is more than max_tokens = 3"),
        ({"stop_strings": ""}, "an empty string is not allowed"),
        ({"suppress_tokens": 4}, "suppress_tokens = 4"),
        ({"bad_words_ids": [4]}, r"bad_words_ids = \[4\]"),
    ],
)
def test_values_out_of_range(fields: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"generation_config.json: .*{named}"):
        defaults(tmp_path, **fields)


def test_where_a_text_ends(tmp_path: Path) -> None:
    where = tmp_path / "config.json"
    assert read_eos(tmp_path, 4, where, VOCAB) == (4,)
    with pytest.raises(CheckpointError, match=r"/config\.json: eos_token_id = '</s>' is neither"):
        read_eos(tmp_path, "</s>", where, VOCAB)
    tiny.edit(tmp_path, generation.FILE, eos_token_id=[2, 5, 999])
    assert read_eos(tmp_path, 4, where, VOCAB) == (2, 5)  # 999 is no token of this vocabulary
    tiny.edit(tmp_path, generation.FILE, eos_token_id="x")
    with pytest.raises(CheckpointError, match=r"/generation_config\.json: eos_token_id = 'x' is neither"):
        read_eos(tmp_path, 4, where, VOCAB)


def test_given_fields_over_the_checkpoints() -> None:
    own = {"logit_bias": {3: -math.inf, 4: 1.0}, "min_tokens": 9, "temperature": 0.5}
    assert generation.over(own, {}) == own
    found = generation.over(own, {"logit_bias": {4: 2.0}, "max_tokens": 5})
    assert found == {"logit_bias": {3: -math.inf, 4: 2.0}, "min_tokens": 5, "temperature": 0.5, "max_tokens": 5}
    assert generation.over({}, {"max_tokens": 5}) == {"max_tokens": 5}
    limited = {"max_tokens": 9}
    assert generation.over(limited, {"max_tokens": 20}) == {"max_tokens": 20}
    assert generation.over(limited, {"min_tokens": 20}) == {"max_tokens": 20, "min_tokens": 20}
    assert generation.over(limited, {"max_tokens": None}) == {"max_tokens": None}, "the rest of the context"


def test_a_model_that_limits_its_texts(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    tiny.edit(folder, generation.FILE, max_new_tokens=4)
    params = SamplingParams(temperature=0, ignore_eos=True)
    llm = LLM(str(folder), dtype="float32")
    lengths = [len(llm.generate("hi", one)[0].outputs[0].token_ids) for one in (params, params.but(max_tokens=6), params.but(min_tokens=5))]
    assert lengths == [4, 6, 5]
    (free,) = LLM(str(folder), dtype="float32", generation_config="none").generate("hi", params)
    assert len(free.outputs[0].token_ids) > 6


def test_a_model_that_suppresses_tokens(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    first = LLM(str(folder), dtype="float32").generate("hi", params)[0].outputs[0].token_ids
    tiny.edit(folder, generation.FILE, suppress_tokens=first)
    made = LLM(str(folder), dtype="float32")
    assert not set(made.generate("hi", params.but(logit_bias={5: 0.1}))[0].outputs[0].token_ids) & set(first)
    tiny.edit(folder, generation.FILE, no_repeat_ngram_size=2)
    with pytest.raises(Unsupported, match="no_repeat_ngram_size = 2"):
        LLM(str(folder), dtype="float32")
    free = LLM(str(folder), dtype="float32", generation_config="none")
    assert free.defaults == {} and free.generate("hi", params)[0].outputs[0].token_ids == first
