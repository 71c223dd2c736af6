"""Checkpoints that load, compared number by number, and checkpoints that are refused, with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from redraft.errors import CheckpointError, InvalidInput, RedraftError, Unsupported
from redraft.models import loader
from redraft.ops.arrays import BFLOAT16
from redraft.ops.backend import Weights
from tests.models import tiny

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama2", tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A good checkpoint, for tests that damage it."""
    return Path(shutil.copytree(made, tmp_path / "model"))


def flat(weights: Weights) -> list[NDArray[Any]]:
    out: list[NDArray[Any]] = []

    def walk(value: Any) -> None:
        if isinstance(value, np.ndarray):
            out.append(value)
        elif isinstance(value, tuple | list):
            for item in value:
                walk(item)
        elif value is not None:
            walk(list(vars(value).values()))

    walk(weights)
    return out


def same(one: Weights, other: Weights) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(flat(one), flat(other), strict=True))


# ---- accepted


def test_every_number_arrives(made: Path) -> None:
    spec, weights = tiny.load(made, dtype="float64")
    state = load_file(made / WEIGHTS)
    at = "model.layers.1"
    layer = weights.layers[1]
    assert np.array_equal(layer.qkv.weight, np.concatenate([state[f"{at}.self_attn.{p}_proj.weight"] for p in "qkv"]))
    assert layer.up is not None and layer.down is not None
    assert np.array_equal(layer.up.weight, np.concatenate([state[f"{at}.mlp.gate_proj.weight"], state[f"{at}.mlp.up_proj.weight"]]))
    assert np.array_equal(layer.down.weight, state[f"{at}.mlp.down_proj.weight"])
    assert np.array_equal(weights.head.weight, state["lm_head.weight"])
    assert all(tensor.flags.c_contiguous and tensor.dtype == np.float64 for tensor in flat(weights))
    assert sum(t.size for t in flat(weights)) == sum(v.size for v in state.values())
    assert spec == loader.inspect(made).spec


def test_inspect_tells_without_reading(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "read", lambda *a: pytest.fail("weights were read"))
    found = loader.inspect(made)
    assert (found.dtype, found.context, found.eos_ids, found.defaults) == ("float32", tiny.CONTEXT, (2,), {})
    monkeypatch.undo()
    assert found.weight_bytes == loader.read(found).bytes
    assert loader.inspect(made, "bfloat16").weight_bytes * 2 == found.weight_bytes


def test_shards(made: Path, tmp_path: Path) -> None:
    sharded = tiny.saved("llama2", tmp_path / "sharded", shard="12KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert same(tiny.load(sharded)[1], tiny.load(made)[1])


def test_tied_and_untied(tmp_path: Path) -> None:
    tied = tiny.save("smollm", tmp_path / "tied")
    _, weights = tiny.load(tied)
    assert weights.head.weight is weights.embed
    tensors = load_file(tied / WEIGHTS)
    copy = tensors["model.embed_tokens.weight"].copy()
    save_file({**tensors, "lm_head.weight": copy}, tied / WEIGHTS)
    assert same(tiny.load(tied)[1], weights)  # some checkpoints also hold the tied head
    save_file({**tensors, "lm_head.weight": copy + 1}, tied / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from the embedding"):
        tiny.load(tied)
    save_file(tensors, tied / WEIGHTS)
    tiny.edit(tied, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"missing tensor lm_head.weight \(tie_word_embeddings is false\)"):
        loader.inspect(tied)


def test_dtypes(tmp_path: Path) -> None:
    stored = tiny.saved("llama2", tmp_path / "bf16", dtype="bfloat16")
    assert loader.inspect(stored).dtype == "bfloat16"
    _, weights = tiny.load(stored, dtype="float64")
    exact = tiny.numbers("model.embed_tokens.weight", (tiny.V, 24), 0).astype(BFLOAT16).astype(np.float64)
    assert weights.embed.dtype == np.float64
    assert np.array_equal(weights.embed, exact)
    tiny.edit(stored, dtype=None)
    assert loader.inspect(stored).dtype == "bfloat16"  # taken from the tensors
    tiny.edit(stored, dtype="float16")
    assert loader.inspect(stored).dtype == "float32"
    assert loader.inspect(stored, device="cuda").dtype == loader.inspect(stored, "float16").dtype == "float16"
    with pytest.raises(InvalidInput, match="dtype = 'int8'"):
        loader.inspect(stored, "int8")


def test_gpt2_names_with_and_without_prefix_and_masks(tmp_path: Path) -> None:
    folder = tiny.save("gpt2", tmp_path / "gpt2")
    _, weights = tiny.load(folder)
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(folder / WEIGHTS).items()}
    masks = {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32), "h.0.attn.masked_bias": np.array(-1e4, np.float32)}
    save_file({**tensors, **masks}, folder / WEIGHTS)
    assert same(tiny.load(folder)[1], weights)


def test_mixtral_as_on_the_hub_and_fused(tmp_path: Path) -> None:
    hub = tiny.save("mixtral", tmp_path / "hub")
    model = tiny.model("mixtral")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any("gate_up_proj" in name for name in loader.inspect(tmp_path / "fused").tensors.tensors)
    assert same(tiny.load(hub)[1], tiny.load(tmp_path / "fused")[1])


@pytest.mark.parametrize("name", ["smollm", "mistral", "qwen2", "qwen3", "mixtral", "mixtral fused", "gpt2"])
def test_tensors_without_the_prefix(name: str, tmp_path: Path) -> None:
    """Names as a class without a head saves them."""
    folder = tiny.save(name.split()[0], tmp_path / "model")
    if name.endswith("fused"):
        shutil.rmtree(folder)
        tiny.model("mixtral").save_pretrained(folder, save_original_format=False)
    weights = tiny.load(folder)[1]
    prefix = loader.inspect(folder).spec.prefix
    tensors(folder, lambda t: [t.update({key.removeprefix(prefix): t.pop(key)}) for key in list(t)])
    assert not any(key.startswith(prefix) for key in load_file(folder / WEIGHTS))
    assert same(tiny.load(folder)[1], weights)
    last = sorted(key for key in load_file(folder / WEIGHTS) if key.startswith(("layers.2.", "h.2.")) and key.endswith("weight"))[-1]
    tensors(folder, lambda t: t.pop(last))
    if "experts" not in last:
        with pytest.raises(CheckpointError, match=f"missing tensor {last}"):
            loader.inspect(folder)
    tensors(folder, lambda t: t.update({f"{prefix}{last}": np.zeros(1, np.float32)}))
    with pytest.raises(CheckpointError, match=r"missing tensor (model|transformer)\."):
        loader.inspect(folder)  # half of the names


def test_what_is_left_over_without_the_prefix_is_named(folder: Path) -> None:
    tensors(folder, lambda t: [t.update({key.removeprefix("model."): t.pop(key)}) for key in list(t)])
    tiny.load(folder)
    tensors(folder, lambda t: t.update({"layers.0.extra": np.zeros(1, np.float32)}))
    with pytest.raises(CheckpointError, match=r"1 tensors unknown to a llama model, the first is layers\.0\.extra"):
        loader.inspect(folder)


def test_generation_config(folder: Path) -> None:
    tiny.edit(folder, "generation_config.json", eos_token_id=[2, 5, 999], temperature=0.6, no_repeat_ngram_size=3)
    found = loader.inspect(folder)
    assert found.eos_ids == (2, 5)
    with pytest.raises(Unsupported, match="no_repeat_ngram_size"):  # only if the defaults are read; a draft model does not need them
        print(found.defaults)


# ---- refused


def tensors(folder: Path, change: Callable[[dict[str, NDArray[Any]]], object]) -> None:
    stored = load_file(folder / WEIGHTS)
    change(stored)
    save_file(stored, folder / WEIGHTS)


def cut(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def shard(folder: Path, spoil: Callable[[Path], None]) -> None:
    (folder / WEIGHTS).unlink()
    tiny.saved("llama2", folder, shard="12KB")
    spoil(folder)


def forget(folder: Path) -> None:
    """The index loses all tensors of the last shard."""
    file = folder / f"{WEIGHTS}.index.json"
    last = max(folder.glob("model-*.safetensors")).name
    kept = {name: where for name, where in json.loads(file.read_text())["weight_map"].items() if where != last}
    tiny.edit(folder, file.name, weight_map=kept)


def index(folder: Path, weight_map: object) -> None:
    shard(folder, lambda at: tiny.edit(at, f"{WEIGHTS}.index.json", weight_map=weight_map))


def only(folder: Path, file: str) -> None:
    (folder / WEIGHTS).rename(folder / file)


def adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")


Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.2.mlp.down_proj.weight"
BAD: dict[str, tuple[Callable[[Path], object], type[RedraftError], str]] = {
    "no folder": (lambda f: shutil.rmtree(f), CheckpointError, "model: no such folder"),
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointError, "no config.json"),
    "corrupt config": (lambda f: (f / "config.json").write_text('{"a": '), CheckpointError, "config.json: not readable as JSON"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), CheckpointError, "config.json: not readable"),
    "deep config": (lambda f: (f / "config.json").write_text("[" * 100_000), CheckpointError, "config.json: not readable as JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), CheckpointError, "config.json: a JSON list"),
    "config of wrong types": (lambda f: tiny.edit(f, hidden_size="wide"), CheckpointError, "config.json: .*hidden_size"),
    "no layers": (lambda f: tiny.edit(f, num_hidden_layers=0), CheckpointError, "config.json: num_hidden_layers = 0: must be"),
    "negative heads": (
        lambda f: tiny.edit(f, num_attention_heads=-1),
        CheckpointError,
        "num_attention_heads = -1: must be an integer from 1",
    ),
    "negative kv heads": (lambda f: tiny.edit(f, num_key_value_heads=-1), CheckpointError, "num_key_value_heads = -1: must be"),
    "fewer windows than none": (
        lambda f: tiny.edit(f, max_window_layers=-1),
        CheckpointError,
        "config.json: max_window_layers = -1: must be an integer, 0 or more",
    ),
    "huge": (lambda f: tiny.edit(f, hidden_size=10**30), CheckpointError, "hidden_size = 1000.*: must be an integer from 1"),
    "no heads": (lambda f: tiny.edit(f, num_attention_heads=0), CheckpointError, "config.json: "),
    "unknown architecture": (lambda f: tiny.edit(f, architectures=["BertModel"]), Unsupported, "'BertModel'.*LlamaForCausalLM"),
    "no architecture": (lambda f: tiny.edit(f, architectures=None), Unsupported, "unknown architecture None"),
    "another family's config": (
        lambda f: tiny.edit(f, model_type="gpt2"),
        CheckpointError,
        "config.json: model_type 'gpt2' .*LlamaForCausalLM",
    ),
    "unknown rope": (
        lambda f: tiny.edit(f, rope_parameters={"rope_type": "spiral", "factor": 2.0, "rope_theta": 1e4}),
        Unsupported,
        "config.json: rope type 'spiral'",
    ),
    "hqq": (lambda f: tiny.edit(f, quantization_config={"quant_method": "hqq"}), Unsupported, "'hqq'"),
    "a text": (lambda f: tiny.edit(f, quantization_config="gptq"), CheckpointError, "quantization_config = 'gptq': must be an object"),
    "a list as method": (lambda f: tiny.edit(f, quantization_config={"quant_method": ["gptq"]}), Unsupported, r"\['gptq'\] are not read"),
    "bitsandbytes": (lambda f: tiny.edit(f, quantization_config={"load_in_4bit": True}), Unsupported, "'bitsandbytes'"),
    "adapter": (adapter, Unsupported, "LoRA/PEFT adapter"),
    "adapter beside weights": (
        lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}'),
        Unsupported,
        r"model: holds a LORA adapter of org/base \(adapter_config.json\), which is not applied; .*remove adapter_config.json",
    ),
    "adapter beside a config": (
        lambda f: only(f, "adapter_model.safetensors") or (f / "adapter_config.json").write_text("{}"),
        Unsupported,
        "LoRA",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), CheckpointError, "no weights: neither model.safetensors"),
    "pickled .bin": (lambda f: only(f, "pytorch_model.bin"), Unsupported, r"pickled weights only \(pytorch_model.bin\)"),
    "pickled .pt": (lambda f: only(f, "model.pt"), Unsupported, r"pickled weights only \(model.pt\)"),
    "pickled .pth": (lambda f: only(f, "consolidated.00.pth"), Unsupported, "consolidated.00.pth"),
    "gguf": (lambda f: only(f, "model-q4.gguf"), Unsupported, "GGUF weights; to read these, name the file: model-q4.gguf"),
    "truncated": (cut, CheckpointError, "model.safetensors: not a whole safetensors file"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), CheckpointError, "model.safetensors: not a whole"),
    "garbage": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 400), CheckpointError, "model.safetensors: not a whole"),
    "missing tensor": (lambda f: tensors(f, lambda t: t.pop(DOWN)), CheckpointError, f"model.safetensors: missing tensor {DOWN}"),
    "missing first part": (lambda f: tensors(f, lambda t: t.pop(Q)), CheckpointError, f"missing tensor {Q}"),
    "wrong shape": (
        lambda f: tensors(f, lambda t: t.update({DOWN: np.zeros((24, 41), np.float32)})),
        CheckpointError,
        rf"{DOWN} has shape \[24, 41\], expected \[24, 40\]",
    ),
    "wrong shares of qkv": (  # their sum is right
        lambda f: tensors(
            f, lambda t: t.update({Q: np.zeros((12, 24), np.float32), Q.replace("q_proj", "k_proj"): np.zeros((24, 24), np.float32)})
        ),
        CheckpointError,
        rf"{Q} has shape \[12, 24\], expected \[24, 24\]",
    ),
    "dtype": (lambda f: tensors(f, lambda t: t.update({Q: np.zeros((24, 24), np.int8)})), Unsupported, f"{Q} has dtype I8"),
    "extra tensors": (
        lambda f: tensors(
            f, lambda t: t.update({"model.layers.0.b": np.zeros(1, np.float32), "model.layers.0.a": np.zeros(1, np.float32)})
        ),
        CheckpointError,
        "2 tensors unknown to a llama model, the first is model.layers.0.a",
    ),
    "a layer too many": (lambda f: tiny.edit(f, num_hidden_layers=2), CheckpointError, "9 tensors .* model.layers.2.input_layernorm"),
    "missing shard": (
        lambda f: shard(f, lambda at: min(at.glob("*.safetensors")).unlink()),
        CheckpointError,
        "missing shard model-00001-of-.*named in model.safetensors.index.json",
    ),
    "corrupt index": (lambda f: index(f, ["a"]), CheckpointError, "index.json: no weight_map"),
    "index that leaves": (lambda f: index(f, {"a": "../other.safetensors"}), CheckpointError, "outside the folder"),
    "index without a shard": (lambda f: shard(f, forget), CheckpointError, "index.json: missing tensor"),
    "bad eos of the config": (
        lambda f: (tiny.edit(f, eos_token_id="</s>"), (f / "generation_config.json").unlink(missing_ok=True)),
        CheckpointError,
        "/config.json: eos_token_id = '</s>'",
    ),
    "bad eos": (lambda f: tiny.edit(f, "generation_config.json", eos_token_id=["</s>"]), CheckpointError, "eos_token_id"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_in_one_line(case: str, folder: Path) -> None:
    spoil, error, named = BAD[case]
    spoil(folder)
    with pytest.raises(error, match=named) as caught:
        tiny.load(folder)
    assert "\n" not in str(caught.value)


def test_rotary_buffers_are_harmless(folder: Path) -> None:
    _, weights = tiny.load(folder)
    tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3, np.float32)}))
    assert same(tiny.load(folder)[1], weights)


def test_no_code_of_a_checkpoint_runs(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Config: pass\n")
    tiny.edit(folder, auto_map={"AutoConfig": "evil.Config"})
    tiny.load(folder)
    assert not (folder / "ran").exists()


# ---- names


def test_resolve(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loader.resolve(str(made)) == made
    assert loader.resolve("embedded").parts[-3:] == ("redraft", "embedded", "target")
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(repo=repo, **options)
        return str(made)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert loader.resolve("org/some-model.v1@refs/pr/2") == made
    assert (asked["repo"], asked["revision"]) == ("org/some-model.v1", "refs/pr/2")
    assert not [pattern for pattern in asked["allow_patterns"] if "bin" in pattern or pattern in ("*", "*.py")]
    loader.resolve("org/name")
    assert asked["revision"] is None


def test_resolve_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached model needs no network. One that is not cached is refused in one line. The client reads both settings at import."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "models--org--name" / "refs").mkdir()
    (cache / "models--org--name" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert loader.resolve("org/name") == snapshot
    with pytest.raises(CheckpointError, match=r"^org/other: no such folder, and the hub does not provide it: ") as caught:
        loader.resolve("org/other")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "error", "named"),
    [
        ("/nowhere/at/all", CheckpointError, "/nowhere/at/all: no such folder"),
        ("../nowhere", CheckpointError, "no such folder, and not a hub id"),
        ("a/b/c", CheckpointError, "a/b/c: no such folder"),
        ("x" * 300, CheckpointError, r"^'x{199}\.\.\.: File name too long$"),
        ("a\nb", CheckpointError, r"^'a\\nb': no such folder"),
        ("some.gguf", CheckpointError, "some.gguf: no such file"),
    ],
)
def test_resolve_refuses(name: str, error: type[RedraftError], named: str) -> None:
    with pytest.raises(error, match=named):
        loader.read_config(loader.resolve(name))


def test_resolve_refuses_a_file(made: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file"):
        loader.resolve(str(made / WEIGHTS))


def test_progress_only_on_a_slow_load_on_a_terminal(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("redraft.models.loader.time.monotonic", lambda: next(clock))
    tiny.load(made)
    assert capsys.readouterr() == ("", "")  # slow, but without a terminal
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    tiny.load(made)
    shown = capsys.readouterr()
    assert shown.out == "" and "loading" in shown.err
