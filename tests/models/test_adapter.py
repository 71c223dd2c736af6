"""LoRA adapters: the logits of merged weights in every form and family, and what is refused."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from redraft import LLM, SamplingParams
from redraft.errors import CheckpointError, InvalidInput, OutOfMemory, RedraftError, Unsupported
from redraft.models import adapter, checkpoint, loader, memory
from redraft.ops import library
from redraft.ops.native import NativeOps
from redraft.ops.numpy_ops import NumpyOps
from tests import adapters, checkpoints
from tests.models.gguf import files

PROMPTS = ["once upon a time", "def f(x):", "the cat sat on the mat and the cat", "a"]
CACHE = 1 << 22


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.tiny_llama(tmp_path_factory.mktemp("base") / "own", hidden_size=64, intermediate_size=96)


def logprobs(model: Path, lora: Path | None = None, **options: Any) -> list[list[float]]:
    """Of the first eight greedy tokens of each prompt and of the five likeliest."""
    llm = LLM(str(model), draft="none", cache_memory=CACHE, lora={} if lora is None else {"x": lora}, **options)
    outputs = llm.generate(PROMPTS, temperature=0, max_tokens=8, ignore_eos=True, logprobs=5, lora=lora and "x")
    return [[value for place in output.outputs[0].logprobs for _, value in sorted(place.top)] for output in outputs]


INSTALLED = find_spec("torch") is not None
EXACT: dict[str, Any] = {"backend": "reference"} if INSTALLED else {"backend": "numpy", "dtype": "float64"}
TORCH: list[dict[str, Any]] = [{"dtype": "float32", "backend": "torch"}] if INSTALLED else []
FORMS: list[dict[str, Any]] = [
    {},
    {"rank": 3, "alpha": 16, "use_rslora": True},
    {"rank": 20, "modules": ("q_proj", "down_proj")},
    {"whole": ("lm_head", "embed_tokens"), "modules": ("v_proj",), "modules_to_save": ["lm_head", "embed_tokens"]},
    {"rank_pattern": {"k_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"o_proj": 1}},
    {"rank_pattern": {"model.layers.0.self_attn.q_proj": 6}, "fan_in_fan_out": False, "lora_dropout": 0.1, "peft_version": "0.17.0"},
]


@pytest.mark.parametrize("form", FORMS, ids=["all", "rslora", "some", "whole", "patterns", "whole names"])
def test_an_adapter_equals_merged_weights(form: dict[str, Any], base: Path, tmp_path: Path) -> None:
    made = adapters.make(tmp_path / "lora", base, **form)
    whole = adapters.merged(tmp_path / "merged", base, made)
    for options in ({"dtype": "float32"}, {"dtype": "float32", "backend": "numpy"}, EXACT, *TORCH):
        own, expected, plain = logprobs(base, made, **options), logprobs(whole, **options), logprobs(base, **options)
        bound = 1e-9 if options is EXACT else 1e-3
        assert np.allclose(own, expected, rtol=0, atol=bound)
        assert not np.allclose(own, plain, rtol=0, atol=0.01)


GPT2, NEOX = ("c_attn", "c_proj", "c_fc"), ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
FAMILIES: dict[str, tuple[str, ...]] = {
    "gpt2": GPT2,
    "gpt-neox": NEOX,  # partly rotated, and queries, keys and values of a head are stored side by side
    "falcon-groups": NEOX,
    "stablelm-biases": adapters.MODULES,  # partly rotated
    "cohere": adapters.MODULES,  # neighbouring dimensions are rotated
    "phi3-partial": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "starcoder2": ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc"),
    "qwen3": adapters.MODULES,
    "gemma3": adapters.MODULES,
    "granite": adapters.MODULES,
    "qwen2-moe": ("q_proj", "v_proj"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_stored_matrices_equals_merged_weights(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if family == "starcoder2":
        monkeypatch.setattr(adapters, "TRANSPOSED", ())  # its c_fc is stored as others are
    own = checkpoints.tiny_llama(tmp_path / "base", family=family)
    made = adapters.make(tmp_path / "lora", own, modules=FAMILIES[family], rank=5)
    assert len(load_file(made / adapter.TENSORS)) >= 2 * 3 * len(FAMILIES[family])
    whole = adapters.merged(tmp_path / "merged", own, made)
    found, expected, plain = (logprobs(*one, **EXACT) for one in ((own, made), (whole,), (own,)))
    assert np.allclose(found, expected, rtol=0, atol=1e-9)
    assert np.allclose(logprobs(own, made, dtype="float32"), expected, rtol=0, atol=1e-3)
    assert not np.allclose(found, plain, rtol=0, atol=0.01)


def test_a_tied_embedding_is_the_head_too_if_the_adapter_says_so(tmp_path: Path) -> None:
    own = checkpoints.tiny_llama(tmp_path / "base", family="qwen3")
    made = adapters.make(tmp_path / "lora", own, whole=("embed_tokens",), modules=("v_proj",), ensure_weight_tying=True)
    alone = adapters.make(tmp_path / "alone", own, whole=("embed_tokens",), modules=("v_proj",))
    whole = adapters.merged(tmp_path / "merged", own, made)  # tied, so its head changes as well
    assert np.allclose(logprobs(own, made, **EXACT), logprobs(whole, **EXACT), rtol=0, atol=1e-9)
    assert not np.allclose(logprobs(own, alone, **EXACT), logprobs(whole, **EXACT), rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["llama2", "gpt2"])
def test_a_gguf_file_takes_adapters_with_the_names_of_its_folder(family: str, tmp_path: Path) -> None:
    """Rows of queries and keys are stored in another order in files of Llama."""
    own = checkpoints.tiny_llama(tmp_path / "base", family=family)
    made = adapters.make(tmp_path / "lora", own, modules=GPT2 if family == "gpt2" else adapters.MODULES)
    file = files.write(own, tmp_path / "own.gguf")
    assert logprobs(file, made, dtype="float32") == logprobs(own, made, dtype="float32")
    assert logprobs(file, made, dtype="float32") != logprobs(file, dtype="float32")


def test_names_may_have_other_first_parts(base: Path, tmp_path: Path) -> None:
    """Classes of transformers put the decoder in other places, but a vision encoder's layers are not the decoder's."""
    made = adapters.make(tmp_path / "lora", base)
    expected = read(base, made)
    for prefix in ("", "base_model.model.", "base_model.model.model.language_model."):
        rename(made, lambda name, prefix=prefix: prefix + name[name.index("layers.") :])
        assert read(base, made).digest == expected.digest
    rename(made, lambda name: f"base_model.model.model.vision_tower.encoder.{name[name.index('layers.') :]}")
    with pytest.raises(Unsupported, match=r"'vision_tower\.encoder\.layers\.\d\.\w+\.\w+' is adapted: only query, key"):
        read(base, made)


def rename(made: Path, to: Callable[..., str]) -> None:
    tensors = load_file(made / adapter.TENSORS)
    save_file({to(name): tensor for name, tensor in tensors.items()}, made / adapter.TENSORS)


def read(base: Path, made: Path) -> adapter.Adapter:
    model = loader.inspect(base, "float32")
    return adapter.read("x", made, model.spec, model.named, NumpyOps("float32"))


def test_the_digest_is_that_of_the_numbers(base: Path, tmp_path: Path) -> None:
    first, same, other = (read(base, adapters.make(tmp_path / str(i), base, seed=seed)) for i, seed in enumerate((1, 1, 2)))
    scaled = read(base, adapters.make(tmp_path / "scaled", base, seed=1, alpha=9))
    assert first.digest == same.digest
    assert len({first.digest, other.digest, scaled.digest}) == 3
    assert len(first.digest) == 32
    assert first.bytes == sum(one.a.nbytes + one.b.nbytes for one in first.terms()) > 0


# ---- what is refused

Q, K = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.1.self_attn.k_proj"
Change = dict[str, Any] | Callable[[dict[str, NDArray[Any]]], Any]
REFUSED: list[tuple[str, Change, type[RedraftError], str]] = [
    ("DoRA", {"use_dora": True}, Unsupported, "use_dora = true"),
    ("another kind", {"peft_type": "IA3"}, Unsupported, "peft_type = 'IA3': only LORA"),
    ("no kind", {"peft_type": None}, Unsupported, "peft_type = None"),
    ("bias", {"bias": "lora_only"}, Unsupported, "bias = 'lora_only': only none"),
    ("initialisation", {"init_lora_weights": "pissa"}, Unsupported, "init_lora_weights = 'pissa'"),
    ("another field", {"layer_replication": [[0, 2]]}, Unsupported, r"'layer_replication' = \[\[0, 2\]\]"),
    ("rank of the config", {"r": 5}, CheckpointError, r"lora_A.weight has shape \[4, \d+\], expected \[5, \d+\]"),
    ("no rank", {"r": 0}, CheckpointError, "r = 0: must be 1 to 1024"),
    ("rank as a text", {"r": "4"}, CheckpointError, "r = '4'"),
    ("pattern of ranks", {"rank_pattern": ["q_proj"]}, CheckpointError, "rank_pattern = .*must be an object"),
    ("rank in a pattern", {"rank_pattern": {"q_proj": 9}}, CheckpointError, r"expected \[9, 64\]"),
    ("expression", {"rank_pattern": {"q_proj(": 4}}, CheckpointError, "rank_pattern: 'q_proj\\(' is no regular expression"),
    ("huge expression", {"rank_pattern": {"q{99999999999999}": 4}}, CheckpointError, "no regular expression"),
    ("large expression", {"rank_pattern": {"((q{1,999}){1,999}){1,999}": 4}}, CheckpointError, "no regular expression, or .* too large"),
    ("look-ahead", {"alpha_pattern": {"(?=q)q_proj": 4}}, CheckpointError, "alpha_pattern: .* look-around"),
    ("long expression", {"alpha_pattern": {"q" * 201: 4}}, CheckpointError, "alpha_pattern: 'q+[.]{3} has 201 characters: at most 200"),
    (
        "long name",
        lambda t: t.update({f"{'model.' * 999}x.lora_A.weight": np.ones((4, 64), np.float32)}),
        CheckpointError,
        "at most 1024 characters",
    ),
    (
        "long name of a whole module",
        lambda t: t.update({f"{'model.' * 999}x.weight": np.ones((9,), np.float32)}),
        CheckpointError,
        "at most 1024",
    ),
    ("alpha", {"lora_alpha": "8"}, CheckpointError, "lora_alpha = '8': must be a number"),
    ("huge alpha", {"lora_alpha": 10**400}, CheckpointError, "lora_alpha = 10+"),
    ("alpha is not a number", {"lora_alpha": float("nan")}, CheckpointError, "lora_alpha = nan"),
    ("rsLoRA", {"use_rslora": "yes"}, CheckpointError, "use_rslora = 'yes'"),
    (
        "head",
        lambda t: t.update({"base_model.model.lm_head.lora_A.weight": np.ones((4, 64), np.float32)}),
        Unsupported,
        "'lm_head' is adapted",
    ),
    (
        "embedding",
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 9), np.float32)}),
        Unsupported,
        "embedding_A",
    ),
    (
        "whole head",
        lambda t: t.update({"base_model.model.lm_head.weight": np.ones((9, 64), np.float32)}),
        CheckpointError,
        r"shape \[9, 64\]",
    ),
    (
        "whole head twice",
        lambda t: [
            t.update({f"base_model.model.lm_head.{part}weight": np.ones((259, 64), np.float32)}) for part in ("", "modules_to_save.")
        ],
        CheckpointError,
        "twice, under two names",
    ),
    (
        "whole head of large numbers",
        lambda t: t.update({"base_model.model.lm_head.weight": np.full((259, 64), 1e300)}),
        CheckpointError,
        "too large for float32",
    ),
    (
        "another model's embedding",
        lambda t: t.update({"base_model.model.vision.embed_tokens.weight": np.ones((259, 64), np.float32)}),
        Unsupported,
        "only lora_A",
    ),
    (
        "whole norm",
        lambda t: t.update({"base_model.model.model.norm.weight": np.ones((64,), np.float32)}),
        Unsupported,
        "only lora_A and lora_B",
    ),
    (
        "magnitude",
        lambda t: t.update({f"{Q}.lora_magnitude_vector.weight": np.ones((64,), np.float32)}),
        Unsupported,
        "only lora_A and lora_B",
    ),
    (
        "layer",
        lambda t: t.update({Q.replace("layers.0", "layers.7") + ".lora_A.weight": np.ones((4, 64), np.float32)}),
        Unsupported,
        "layers.7",
    ),
    (
        "shape of A",
        lambda t: t.update({f"{Q}.lora_A.weight": np.ones((4, 63), np.float32)}),
        CheckpointError,
        r"\[4, 63\], expected \[4, 64\]",
    ),
    (
        "shape of B",
        lambda t: t.update({f"{K}.lora_B.weight": np.ones((64, 4), np.float32)}),
        CheckpointError,
        r"\[64, 4\], expected \[32, 4\]",
    ),
    ("vector", lambda t: t.update({f"{Q}.lora_A.weight": np.ones((4,), np.float32)}), CheckpointError, r"shape \[4\]"),
    ("no A", lambda t: t.pop(f"{Q}.lora_A.weight"), CheckpointError, "q_proj: lora_A.weight is missing"),
    ("no B", lambda t: t.pop(f"{Q}.lora_B.weight"), CheckpointError, "q_proj: lora_B.weight is missing"),
    ("twice", lambda t: t.update({f"{Q}.lora_A.default.weight": np.ones((4, 64), np.float32)}), CheckpointError, "is there twice"),
    ("NaN", lambda t: t[f"{Q}.lora_A.weight"].reshape(-1)[3:4].fill(float("nan")), CheckpointError, "infinite or undefined"),
    ("infinity", lambda t: t[f"{Q}.lora_B.weight"].reshape(-1)[3:4].fill(float("inf")), CheckpointError, "infinite or undefined"),
    ("overflow", lambda t: t[f"{Q}.lora_B.weight"].fill(3e38), CheckpointError, "too large for float32"),
    ("integers", lambda t: t.update({f"{Q}.lora_A.weight": np.ones((4, 64), np.int32)}), CheckpointError, "has dtype I32"),
    ("nothing", lambda t: t.clear(), CheckpointError, "holds no tensors"),
]


@pytest.mark.parametrize(("change", "kind", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_is_refused_is_named_in_one_line(change: Change, kind: type[RedraftError], message: str, base: Path, tmp_path: Path) -> None:
    made = adapters.make(tmp_path / "lora", base)
    if isinstance(change, dict):
        config = json.loads((made / adapter.CONFIG).read_text()) | change
        (made / adapter.CONFIG).write_text(json.dumps(config))
    else:
        tensors = load_file(made / adapter.TENSORS)
        change(tensors)
        save_file(tensors, made / adapter.TENSORS)
    with pytest.raises(kind, match=message) as error:
        read(base, made)
    assert "\n" not in str(error.value) and str(made) in str(error.value)


def test_a_pattern_matches_as_in_peft() -> None:
    modules = [f"model.layers.{i}.{part}_proj" for i in (0, 1, 10) for part in ("self_attn.q", "self_attn.v", "mlp.down")]
    keys = ["q_proj", "proj", "layers.1.self_attn.q_proj", "^layers.0.mlp.down_proj", "^model.layers.0.mlp.down_proj", ".*", "v_proj$",
            r"layers\.\d+\.self_attn\.(q|v)_proj", r"[^.]+", "x)|(.*v_proj", ""]  # fmt: skip
    for key in keys:
        expected = [module for module in modules if re.match(rf"(.*\.)?({key})$", module)]  # peft.utils.get_pattern_key
        assert list(adapter._matched(Path("x"), {"rank_pattern": {key: 3}}, "rank_pattern", modules)) == expected
    assert adapter._matched(Path("x"), {"r": {"q_proj": 1, ".*": 2, "proj": 3}}, "r", modules[:2]) == {modules[0]: 1, modules[1]: 2}


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_no_pattern_takes_long(field: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's engine needs ten seconds and more for this key, and for some keys it has no end."""
    made = adapters.make(tmp_path / "lora", base, modules=("q_proj",), **{field: {"(.*.*.*.*.*.*.*.*.*)Q": 4}})
    begun = time.process_time()
    assert len([*read(base, made).terms()]) == 3
    assert time.process_time() - begun < 5
    monkeypatch.setattr(adapter, "LONGEST_MATCHING", 0)
    with pytest.raises(CheckpointError, match=f"adapter_config.json: {field}: its 1 keys take more than 0 seconds to match"):
        read(base, made)


def test_an_adapter_that_does_not_fit_is_refused_before_it_is_read(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = adapters.make(tmp_path / "lora", base)
    counts = [tensor.size for tensor in load_file(made / adapter.TENSORS).values()]
    needed = 4 * sum(counts) + 16 * max(counts)
    monkeypatch.setattr(memory, "limits", lambda device: needed)
    assert read(base, made).bytes == 4 * sum(counts)
    monkeypatch.setattr(memory, "limits", lambda device: needed - 1)
    monkeypatch.setattr(checkpoint.TensorFile, "read", lambda *given: pytest.fail("is read"))
    sizes = f"it needs {memory.size(needed)}, free {memory.size(needed - 1)}"
    with pytest.raises(OutOfMemory, match=rf"lora: the adapter does not fit: {sizes}$"):
        read(base, made)


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe"])
def test_experts_are_refused(family: str, tmp_path: Path) -> None:
    own = checkpoints.tiny_llama(tmp_path / "base", family=family)
    made = adapters.make(tmp_path / "lora", own)
    rename(made, lambda name: name.replace("self_attn.q_proj", "mlp.experts.0.down_proj"))
    with pytest.raises(Unsupported, match="is adapted: only query"):
        read(own, made)


def test_files_that_are_missing_pickled_or_damaged(base: Path, tmp_path: Path) -> None:
    made = adapters.make(tmp_path / "lora", base)
    whole = (made / adapter.TENSORS).read_bytes()
    for tenth in range(10):
        (made / adapter.TENSORS).write_bytes(whole[: len(whole) * tenth // 10])
        with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: not a whole safetensors file: [^\n]+$"):
            read(base, made)
    (made / adapter.TENSORS).unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        read(base, made)
    (made / adapter.PICKLED).write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"holds adapter_model\.bin only, which could run code"):
        read(base, made)
    with (made / adapter.CONFIG).open("r+b") as file:
        file.truncate(1 << 40)  # no such disk is needed
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: has 1099511627776 bytes: at most 67108864 are read"):
        read(base, made)
    (made / adapter.CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        read(base, made)
    for place in (tmp_path / "none", tmp_path / ("x" * 300), base / "config.json", Path("~nobody/x")):
        with pytest.raises(CheckpointError):
            read(base, place)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["peft_type", "r", "lora_alpha", "bias", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights",
     "modules_to_save", "target_modules", "layer_replication", "other"]
)  # fmt: skip


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(changes=st.dictionaries(FIELDS, JSON, min_size=1, max_size=3))
def test_any_config_is_read_or_refused_in_one_line(changes: dict[str, Any], base: Path, tmp_path: Path) -> None:
    made = tmp_path / "lora"
    if not made.exists():
        adapters.make(made, base, modules=("q_proj",))
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    (made / adapter.CONFIG).write_text(json.dumps(raw | changes))
    try:
        found = read(base, made)
    except RedraftError as error:
        lines = str(error).splitlines()
    else:
        lines = ["read"] if len([*found.terms()]) == 3 else []
    assert len(lines) == 1


def test_a_name_is_taken_once(base: Path, tmp_path: Path) -> None:
    made = adapters.make(tmp_path / "lora", base)
    llm = LLM(str(base), cache_memory=CACHE, lora={"x": made})
    assert llm.loras == ["x"] == llm.sibling(draft="none").loras
    with pytest.raises(InvalidInput, match="lora = 'x': an adapter of this name is loaded"):
        llm.load_lora("x", made)
    for name in ("", ".x", "a/b", "a b", "x" * 65, "a\n", 3):
        with pytest.raises(InvalidInput, match="lora = "):
            llm.load_lora(name, made)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="lora = 'y': known: x"):
        llm.generate("a", lora="y")
    llm.unload_lora("x")
    assert llm.loras == []
    for call in (lambda: llm.unload_lora("x"), lambda: llm.generate("a", lora="x")):
        with pytest.raises(InvalidInput, match="lora = 'x': no adapter is loaded"):
            call()
    with pytest.raises(CheckpointError):
        llm.load_lora("x", base)
    assert llm.loras == []


def test_embeddings_have_the_adapter(base: Path, tmp_path: Path) -> None:
    made = adapters.make(tmp_path / "lora", base)
    options: dict[str, Any] = {"cache_memory": CACHE, **EXACT}
    llm, whole = LLM(str(base), lora={"x": made}, **options), LLM(str(adapters.merged(tmp_path / "merged", base, made)), **options)
    for pooling in ("last", "mean"):
        found, plain = llm.embed(PROMPTS, pooling, lora="x"), llm.embed(PROMPTS, pooling)
        assert np.allclose(found, whole.embed(PROMPTS, pooling), rtol=0, atol=1e-9)
        assert not np.allclose(found, plain, rtol=0, atol=1e-3)


@pytest.mark.skipif(bool(library.why_not()), reason="no native kernels")
@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"quant": "int8"}, {"quant": "int4:group=32"}], ids=str)
def test_layers_in_one_call_have_the_bits_of_single_operations(
    options: dict[str, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also rows of the model itself in a batch with adapters, and an adapter alone."""
    folders = {f"a{i}": adapters.make(tmp_path / f"a{i}", base, seed=i, rank=3 + 7 * i) for i in range(2)}
    llm = LLM(str(base), draft="none", cache_memory=CACHE, prefix_sharing=False, lora=folders, **options)
    chosen = [SamplingParams(temperature=0, max_tokens=8, logprobs=3, lora=name) for name in ("a0", "a1", None, "a0")]

    def found(one: bool) -> list[Any]:
        if not one:
            outputs = llm.generate(PROMPTS, chosen)
        else:
            outputs = [llm.generate([prompt], [params])[0] for prompt, params in zip(PROMPTS, chosen, strict=True)]
        return [[(place.logprob, place.top) for place in output.outputs[0].logprobs] for output in outputs]

    whole = found(one=False)
    for name in ("forward", "run"):  # the whole pass, then segments, then single operations
        calls: list[Any] = []
        method = getattr(NativeOps, name)
        with monkeypatch.context() as patch:
            patch.setattr(NativeOps, name, lambda *given, method=method, calls=calls: calls.append(method(*given)) or calls[-1])
            assert found(one=True) == found(one=False) == whole
        assert calls and all(call is not None for call in calls)
        monkeypatch.setattr(NativeOps, name, lambda *given: None)
    assert found(one=False) == whole


@pytest.mark.skipif(bool(library.why_not()), reason="no native kernels")
@pytest.mark.parametrize("family", ["gpt-neox", "cohere"])
def test_parallel_layers_of_codes_have_the_bits_of_single_operations(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and mlp read the layer's input at the same time, so neither may overwrite it before the terms have read it."""
    own = checkpoints.tiny_llama(tmp_path / "base", family=family)
    made = adapters.make(tmp_path / "lora", own, modules=FAMILIES[family])
    found = logprobs(own, made, quant="int8")
    for name in ("forward", "run"):
        monkeypatch.setattr(NativeOps, name, lambda *given: None)
    assert logprobs(own, made, quant="int8") == found
