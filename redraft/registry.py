"""Names of methods: seam -> name -> "module:Class". A module is imported only when its method is requested."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import typing
from collections.abc import Iterable
from typing import Any

from redraft.errors import InvalidInput, UnknownMethod, Unsupported, did_you_mean, shown

METHODS: dict[str, dict[str, str]] = {
    "draft": {
        "none": "redraft.draft.none:NoDraft",
        "aded": "redraft.draft.aded:ADED",
        "aggressive": "redraft.draft.aggressive:Aggressive",
        "auto": "redraft.draft.auto:Auto",
        "copyspec": "redraft.draft.copyspec:CopySpec",
        "del": "redraft.draft.exits:DEL",
        "draft-model": "redraft.draft.draft_model:DraftModel",
        "dyspec": "redraft.draft.dyspec:DySpec",
        "eagle": "redraft.draft.eagle:Eagle",
        "hydra": "redraft.draft.hydra:Hydra",
        "kangaroo": "redraft.draft.kangaroo:Kangaroo",
        "medusa": "redraft.draft.medusa:Medusa",
        "ngram": "redraft.draft.ngram:NGram",
        "omnidraft": "redraft.draft.omnidraft:OmniDraft",
        "online": "redraft.draft.online:Online",
        "optimal-multi-draft": "redraft.draft.optimal_multi_draft:OptimalMultiDraft",
        "ppd": "redraft.draft.ppd:PPD",
        "rapid": "redraft.draft.rapid:RapidDraft",
        "rsd-c": "redraft.draft.rsd_c:RSDC",
        "rsd-s": "redraft.draft.rsd_s:RSDS",
        "s2d": "redraft.draft.exits:S2D",
        "self-skip": "redraft.draft.self_skip:SelfSkip",
        "spectr": "redraft.draft.spectr:SpecTr",
        "suffix": "redraft.draft.suffix:Suffix",
        "swift": "redraft.draft.swift:SWIFT",
        "token-recycling": "redraft.draft.token_recycling:TokenRecycling",
        "union": "redraft.draft.union:Union",
        "vocabtrim": "redraft.draft.vocabtrim:VocabTrim",
    },
    "control": {
        "awrs": "redraft.sample.controls.awrs:AWRS",
        "momentum": "redraft.sample.controls.momentum:Momentum",
        "rpg": "redraft.sample.controls.rpg:RPG",
    },
    "codec": {
        "int4": "redraft.kv.quantization.kivi:Int4",
        "kivi": "redraft.kv.quantization.kivi:KIVI",
        "gear": "redraft.kv.quantization.gear:GEAR",
        "think": "redraft.kv.quantization.think:ThinK",
        "mikv": "redraft.kv.quantization.mikv:MiKV",
        "int8": "redraft.kv.quantization.int8:Int8",
    },
    "depth": {
        "first": "redraft.layer_skipping.first:FiRST",
        "layer-skip": "redraft.layer_skipping.layer_skip:UnifiedLayerSkipping",
        "skip-decode": "redraft.layer_skipping.skip_decode:SkipDecode",
    },
    "keep": {
        "ada-kv": "redraft.kv.eviction.ada_kv:AdaKV",
        "compresskv": "redraft.kv.eviction.compress_kv:CompressKV",
        "d2o": "redraft.kv.eviction.d2o:D2O",
        "duo": "redraft.kv.eviction.duo:DuoAttention",
        "elastic-cache": "redraft.kv.eviction.elastic_cache:ElasticCache",
        "ems": "redraft.kv.eviction.ems:EMS",
        "h2o": "redraft.kv.eviction.h2o:H2O",
        "kvmerger": "redraft.kv.eviction.kv_merger:KVMerger",
        "lazy-eviction": "redraft.kv.eviction.lazy_eviction:LazyEviction",
        "prefixkv": "redraft.kv.eviction.prefix_kv:PrefixKV",
        "razor": "redraft.kv.eviction.razor:RazorAttention",
        "scissorhands": "redraft.kv.eviction.scissorhands:Scissorhands",
        "snapkv": "redraft.kv.eviction.snap_kv:SnapKV",
        "streaming-llm": "redraft.kv.eviction.streaming_llm:StreamingLLM",
    },
    "read": {
        "a2ats": "redraft.kv.sparse_attention.a2ats:A2ATS",
        "double-sparsity": "redraft.kv.sparse_attention.double_sparsity:DoubleSparsity",
        "infllm": "redraft.kv.sparse_attention.infllm:InfLLM",
        "page-top-k": "redraft.kv.sparse_attention.page_top_k:PageTopK",
        "sentencekv": "redraft.kv.sparse_attention.sentence_kv:SentenceKV",
    },
    "reuse": {
        "ape": "redraft.kv.reuse.ape:APE",
        "cache-craft": "redraft.kv.reuse.cache_craft:CacheCraft",
        "cacheblend": "redraft.kv.reuse.cacheblend:CacheBlend",
        "kvshare": "redraft.kv.reuse.kvshare:KVShare",
        "pie": "redraft.kv.reuse.pie:PIE",
    },
    "steer": {
        "context-knob": "redraft.steer.knob:ContextKnob",
    },
    "verify": {
        "coupled": "redraft.verify.coupled:Coupled",
        "greedy-multi-draft": "redraft.verify.greedy_multi_draft:GreedyMultiDraft",
        "judge": "redraft.verify.judge:Judge",
        "k-seq": "redraft.verify.k_seq:KSeq",
        "multi-candidate": "redraft.verify.multi_candidate:MultiCandidate",
        "rapid": "redraft.verify.rapid:Rapid",
        "recursive": "redraft.verify.recursive:Recursive",
        "rejection": "redraft.verify.rejection:Rejection",
        "typical": "redraft.verify.typical:Typical",
    },
    "quant": {
        "int4": "redraft.weights.int4:FineQuant",
        "int8": "redraft.weights.int8:LLMInt8",
        "stored": "redraft.weights.stored:AsStored",
    },
    "route": {
        "least-load": "redraft.sched.routers.least_load:LeastLoad",
        "prefix-affinity": "redraft.sched.routers.prefix_affinity:PrefixAffinity",
        "round-robin": "redraft.sched.routers.round_robin:RoundRobin",
        "splitwise": "redraft.sched.routers.splitwise:Splitwise",
    },
    "sched": {
        "batchllm": "redraft.sched.batchllm:BatchLLM",
        "fcfs": "redraft.sched.fcfs:FCFS",
        "piggyback": "redraft.sched.piggyback:Piggyback",
        "sarathi": "redraft.sched.sarathi:Sarathi",
        "spf": "redraft.sched.spf:ShortestPromptFirst",
    },
}

# Logits processors in order of application. Processors that index tokens by id come before the filters, which drop tokens.
PROCESSORS: dict[str, str] = {
    "logit-bias": "redraft.sample.processors.bias:Bias",
    "bad-words": "redraft.sample.processors.bad_words:BadWords",
    "min-tokens": "redraft.sample.processors.min_tokens:MinTokens",
    "penalties": "redraft.sample.processors.penalties:Penalties",
    "dry": "redraft.sample.processors.dry:DRY",
    "temperature": "redraft.sample.processors.temperature:Temperature",
    "control-logits": "redraft.sample.processors.control:LogitControls",
    "grammar": "redraft.sample.processors.grammar:FollowGrammar",
    "top-n-sigma": "redraft.sample.processors.top_n_sigma:TopNSigma",
    "top-k": "redraft.sample.processors.top_k:TopK",
    "top-p": "redraft.sample.processors.top_p:TopP",
    "min-p": "redraft.sample.processors.min_p:MinP",
    "typical-p": "redraft.sample.processors.typical_p:TypicalP",
    "xtc": "redraft.sample.processors.xtc:XTC",
    "dynamic-temperature": "redraft.sample.processors.dynamic_temperature:DynamicTemperature",
    "mirostat": "redraft.sample.processors.mirostat:Mirostat",
    "control-filtered": "redraft.sample.processors.control:FilteredControls",
    "control-check": "redraft.sample.processors.control:CheckControls",
}

NEEDS_TORCH = "it needs PyTorch, which is not installed: pip install 'redraft[torch]'"
BACKENDS: dict[str, str] = {
    "native": "redraft.ops.native:NativeOps",
    "numpy": "redraft.ops.numpy_ops:NumpyOps",
    "reference": "redraft.ops.reference:Reference",
    "torch": "redraft.ops.torch_ops:TorchOps",
}

# config.json "architectures"[0] -> the function that fills a ModelSpec from the checkpoint's config
FAMILIES: dict[str, str] = {
    "Cohere2ForCausalLM": "redraft.models.cohere2:FAMILY",
    "CohereForCausalLM": "redraft.models.cohere:FAMILY",
    "FalconForCausalLM": "redraft.models.falcon:FAMILY",
    "Gemma2ForCausalLM": "redraft.models.gemma2:FAMILY",
    "Gemma3ForCausalLM": "redraft.models.gemma3:FAMILY",
    "Gemma3ForConditionalGeneration": "redraft.models.gemma3:WITH_VISION",
    "GPT2LMHeadModel": "redraft.models.gpt2:FAMILY",
    "GPTNeoXForCausalLM": "redraft.models.gpt_neox:FAMILY",
    "GptOssForCausalLM": "redraft.models.gpt_oss:FAMILY",
    "GraniteForCausalLM": "redraft.models.granite:FAMILY",
    "GraniteMoeForCausalLM": "redraft.models.granite_moe:FAMILY",
    "LlamaForCausalLM": "redraft.models.llama:FAMILY",
    "MistralForCausalLM": "redraft.models.mistral:FAMILY",
    "MixtralForCausalLM": "redraft.models.mixtral:FAMILY",
    "Olmo2ForCausalLM": "redraft.models.olmo2:FAMILY",
    "Olmo3ForCausalLM": "redraft.models.olmo3:FAMILY",
    "OPTForCausalLM": "redraft.models.opt:FAMILY",
    "Phi3ForCausalLM": "redraft.models.phi3:FAMILY",
    "Qwen2ForCausalLM": "redraft.models.qwen2:FAMILY",
    "Qwen2MoeForCausalLM": "redraft.models.qwen2_moe:FAMILY",
    "Qwen3ForCausalLM": "redraft.models.qwen3:FAMILY",
    "Qwen3MoeForCausalLM": "redraft.models.qwen3_moe:FAMILY",
    "SmolLM3ForCausalLM": "redraft.models.smollm3:FAMILY",
    "StableLmForCausalLM": "redraft.models.stablelm:FAMILY",
    "Starcoder2ForCausalLM": "redraft.models.starcoder2:FAMILY",
}


# config.json "quantization_config" "quant_method" -> how such folders store their matrices
STORED: dict[str, str] = {
    "awq": "redraft.models.stored.awq:Awq",
    "compressed-tensors": "redraft.models.stored.compressed_tensors:CompressedTensors",
    "fp8": "redraft.models.stored.fp8:Fp8",
    "gptq": "redraft.models.stored.gptq:Gptq",
    "mxfp4": "redraft.models.stored.mxfp4:Mxfp4",
}


# Formats in which models write tool calls and reasoning, in the order in which a chat template is searched for their marks
TOOL_PARSERS: dict[str, str] = {
    "deepseek": "redraft.serve.parsers.deepseek:DeepSeek",
    "gpt-oss": "redraft.serve.parsers.gpt_oss:HarmonyCalls",
    "mistral": "redraft.serve.parsers.mistral:Mistral",
    "granite": "redraft.serve.parsers.granite:Granite",
    "hermes": "redraft.serve.parsers.hermes:Hermes",
    "llama3": "redraft.serve.parsers.llama3:Llama3",
}
REASONING_PARSERS: dict[str, str] = {
    "gpt-oss": "redraft.serve.parsers.gpt_oss:Harmony",
    "magistral": "redraft.serve.parsers.magistral:Magistral",
    "think": "redraft.serve.parsers.think:Think",
}
NO_PARSER = "none"  # the name that switches a parser off


def load(target: str) -> Any:
    """The object that "module:name" points to."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def backend(name: str) -> Any:
    """The class of a backend. Raises UnknownMethod for an unknown name, Unsupported where its package is not installed."""
    if name not in BACKENDS:
        raise unknown("backend", name, BACKENDS)
    try:
        return load(BACKENDS[name])
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise Unsupported(f"backend = {name!r}: {NEEDS_TORCH}") from None


def unknown(what: str, name: str, known: Iterable[str]) -> UnknownMethod:
    return UnknownMethod(f"no {what} {shown(name)}: {did_you_mean(name, known)}")


def method(seam: str, name: str) -> type:
    """The class registered under `name`. Raises UnknownMethod with similar names."""
    if name not in METHODS[seam]:
        raise unknown(f"{seam} method", name, METHODS[seam])
    return typing.cast(type, load(METHODS[seam][name]))


def name_of(cls: type) -> str:
    """A method's name on the command line, or the class's own name if it is not registered."""
    target = f"{cls.__module__}:{cls.__qualname__}"
    return next((name for methods in METHODS.values() for name, one in methods.items() if one == target), cls.__name__)


def options(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """The hyper-parameters of a method: the fields of its frozen dataclass."""
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


def split(text: str, separator: str) -> list[str]:
    """Splits at separators outside parentheses and drops empty parts. Parentheses around a whole part are removed.
    Raises InvalidInput if parentheses do not match.

    >>> split("(copyspec:gamma=4,block=8)+token-recycling", "+")
    ['copyspec:gamma=4,block=8', 'token-recycling']
    """
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text + separator):
        depth += (letter == "(") - (letter == ")")
        if depth < 0 or (i == len(text) and depth):
            raise InvalidInput(f"{text!r}: parentheses do not match")
        if letter == separator and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    return [_bare(part) for part in parts if part]


def _bare(text: str) -> str:
    """`text` without parentheses that enclose all of it."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[1:-1] if letter == ")" and i == len(text) - 1 else text
    return text


def parse(text: str) -> tuple[str, dict[str, str]]:
    """ "name:option=value,option=value" -> (name, {option: value}), values as text. A value that contains commas, such
    as another method with options, needs parentheses."""
    if not isinstance(text, str):
        raise InvalidInput(f"{shown(text)} of type {type(text).__name__}: name:option=value,... is needed")
    name, _, rest = _bare(text.strip()).partition(":")
    given: dict[str, str] = {}
    for item in split(rest, ","):
        option, equals, value = item.partition("=")
        if not equals:
            raise InvalidInput(f"{text!r}: {item!r} is not option=value")
        option = option.strip().replace("-", "_")
        if option in given:
            raise InvalidInput(f"{text!r}: {option!r} is given twice")
        given[option] = value.strip()
    return name.strip(), given


def create(seam: str, text: str, **defaults: Any) -> Any:
    """An instance of a method from "name:option=value,...". `defaults` set options of the class that the text does not set.
    Raises UnknownMethod for an unknown name or option, InvalidInput for a bad value."""
    return build(method(seam, parse(text)[0]), text, **defaults)


def build(cls: type, text: str, **defaults: Any) -> Any:
    """An instance of this class, whatever the name in the text is; else as `create`."""
    name, given = parse(text)
    known = options(cls)
    hints = _hints(cls)
    values: dict[str, Any] = {k: v for k, v in defaults.items() if k in known}
    for option, value in given.items():
        if option not in known:
            allowed = ", ".join(known) or "none"
            raise UnknownMethod(f"unknown option {option!r} of {name}; allowed: {allowed}")
        values[option] = _convert(name, option, value, hints[option])
    return cls(**values)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _convert(name: str, option: str, value: str, hint: Any) -> Any:
    kinds = [t for t in (typing.get_args(hint) or (hint,)) if t is not type(None)]
    if value.lower() == "none" and len(kinds) < len(typing.get_args(hint)):
        return None
    kind = kinds[0]
    try:
        if kind is bool:
            return {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}[value.lower()]
        return kind(value)
    except (KeyError, ValueError):
        raise InvalidInput(f"{name}:{option}={value}: not {'an' if kind is int else 'a'} {kind.__name__}") from None
