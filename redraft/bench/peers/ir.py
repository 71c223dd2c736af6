"""A checkpoint as an OpenVINO model: IR files in a folder of the cache. The graph has the operations of OpenVINO's own exports, so that
its CPU plugin recognizes what it can fuse: norms, rotary positions, attention over a cache that the model keeps.

Numbers are copied unchanged, matrices in the run's dtype. Inputs: `input_ids` [1, rows], `position_ids` [1, rows], `beam_idx` [1] (zero),
`wanted` (how many of the last rows have an answer). Output: `best` [wanted], the likeliest next token of each of them. A model for OpenVINO
GenAI has any number of texts, `attention_mask` in place of `wanted`, and the output `logits` [texts, rows, vocabulary].
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from redraft.bench.shapes import cache_folder
from redraft.core.spec import Attention, LayerSpec, Mlp, ModelSpec, Norm
from redraft.errors import Unsupported
from redraft.models import loader
from redraft.ops.arrays import DTYPES, name_of

VERSION = 2  # version of the graph; each version has its own folder
KINDS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}

ov: Any = None  # an optional package
op: Any = None


def converted(folder: Path, dtype: str, *, genai: bool = False) -> Path:
    """The .xml file, from the cache folder or written into it. genai: in a folder that OpenVINO GenAI loads."""
    if folder.is_file():
        raise Unsupported(f"{folder}: a GGUF file; OpenVINO is measured with folders only")
    found = loader.inspect(folder, dtype)
    _check(found.spec, found.dtype)
    kind = str(found.dtype)
    files = sorted((str(file), file.stat().st_mtime_ns) for file in found.tensors.files)
    name = hashlib.sha256(repr((VERSION, folder.resolve(), files)).encode()).hexdigest()[:10]
    made = cache_folder() / "openvino" / f"{folder.resolve().name}-{kind}{'-genai' * genai}-{name}"
    file = "openvino_model.xml" if genai else "model.xml"
    if not made.exists():
        part = made.with_name(f".{made.name}.{os.getpid()}.part")
        part.mkdir(parents=True)
        try:
            graph = _Graph(found, genai)
            ov.save_model(graph.model(), part / file, compress_to_fp16=False)
            if genai:
                shutil.copy(folder / "config.json", part)
            try:
                part.rename(made)
            except OSError:
                if not made.exists():  # else another run has written the same numbers
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return made / file


def write_tokenizer(made: Path, folder: Path) -> None:
    """The checkpoint's tokenizer beside its model. OpenVINO GenAI compares the tokenizers of a model and its draft model."""
    if not (made / "openvino_tokenizer.xml").exists():
        openvino, package = importlib.import_module("openvino"), importlib.import_module("openvino_tokenizers")
        whole = importlib.import_module("transformers").AutoTokenizer.from_pretrained(folder, local_files_only=True)
        both = package.convert_tokenizer(whole, with_detokenizer=True)
        for model, name in zip(both, ("tokenizer", "detokenizer"), strict=True):
            openvino.save_model(model, made / f"openvino_{name}.xml")


def _check(spec: ModelSpec, dtype: np.dtype[Any]) -> None:
    for layer, mixer in zip(spec.layers, spec.attention, strict=True):
        plain = isinstance(layer.mlp, Mlp) and layer.mlp == Mlp(layer.mlp.hidden, bias=layer.mlp.bias)
        turned = mixer.rotary is not None and mixer.rotary.dim == mixer.head_dim and not mixer.rotary.still
        usual = layer == LayerSpec(mixer, layer.mlp, layer.norm)
        usual = usual and mixer == replace(
            mixer, scale=None, softcap=None, norm_heads_together=False, norm_heads_apart=False, sink_logits=False
        )
        if not (plain and turned and usual) or _norm(layer).kind != "rms" or mixer.window is not None or spec.embed_scale != 1.0:
            raise Unsupported(
                f"no OpenVINO graph for this {spec.family}: only layers as in Llama, of RMS norms, rotary heads and a gated SiLU, without "
                "windows and other factors"
            )
    if name_of(dtype) not in KINDS:
        raise Unsupported(f"no OpenVINO graph in {name_of(dtype)}")


def _norm(layer: LayerSpec) -> Norm:
    return layer.norm or Norm("layer")


class _Graph:
    def __init__(self, found: loader.Checkpoint, genai: bool) -> None:
        global ov, op
        ov = importlib.import_module("openvino")
        op = importlib.import_module("openvino.opset15")
        self.found, self.spec, self.genai = found, found.spec, genai
        self.sinks: list[Any] = []
        self.held: list[Any] = []  # keeps the memory of constants alive

    def model(self) -> Any:
        spec, texts = self.spec, -1 if self.genai else 1
        self.ids = op.parameter([texts, -1], ov.Type.i64, name="input_ids")
        self.positions = op.parameter([texts, -1], ov.Type.i64, name="position_ids")
        self.beam = op.parameter([texts], ov.Type.i32, name="beam_idx")
        wanted = op.parameter([-1, -1], ov.Type.i64, name="attention_mask") if self.genai else op.parameter([1], ov.Type.i64, name="wanted")
        given = [self.ids, self.positions, self.beam, wanted]
        for node in given:
            node.output(0).get_tensor().set_names({node.get_friendly_name()})
        embed = self.weight("embed")
        x = op.gather(embed, self.ids, number(0))
        self.cos, self.sin = self.turns(spec.attention[0])
        self.mask = None
        for i, (layer, mixer) in enumerate(zip(spec.layers, spec.attention, strict=True)):
            x = op.add(x, self.attention(f"layers.{i}", mixer, self.norm(x, f"layers.{i}.attn_norm", _norm(layer))))
            x = op.add(x, self.mlp(f"layers.{i}", self.norm(x, f"layers.{i}.mlp_norm", _norm(layer))))
        if not self.genai:
            x = op.slice(x, op.negative(wanted), numbers(2**31 - 1), numbers(1), numbers(1))
        out = self.product(self.norm(x, "final_norm", spec.final_norm), embed if spec.tied else self.weight("head"))
        if not self.genai:
            best = op.topk(out, number(1), 2, "max", "value", index_element_type="i64").output(1)
            out = op.reshape(best, numbers(-1), special_zero=False)
        result = op.result(out)
        result.output(0).get_tensor().set_names({"logits" if self.genai else "best"})
        return ov.Model([result], self.sinks, given, self.found.path.name)

    # ---- parts

    def attention(self, at: str, layer: Attention, x: Any) -> Any:
        q, k, v = (
            op.transpose(
                op.reshape(self.linear(x, f"{at}.qkv", part), numbers(0, 0, heads, layer.head_dim), special_zero=True), numbers(0, 2, 1, 3)
            )
            for part, heads in enumerate((layer.heads, layer.kv_heads, layer.kv_heads))
        )
        if layer.qk_norm is not None:
            q, k = self.norm(q, f"{at}.q_norm", layer.qk_norm), self.norm(k, f"{at}.k_norm", layer.qk_norm)
        q, k = self.turned(q, layer.head_dim), self.turned(k, layer.head_dim)
        keys, values = self.cached(f"{at}.keys", k, layer), self.cached(f"{at}.values", v, layer)
        if self.mask is None:
            self.mask = self.seen(keys)
        keys, values = self.grouped(keys, layer), self.grouped(values, layer)
        out = op.scaled_dot_product_attention(q, keys, values, self.mask, number(np.float32(layer.head_dim**-0.5)))
        out = op.reshape(op.transpose(out, numbers(0, 2, 1, 3)), numbers(0, 0, layer.heads * layer.head_dim), special_zero=True)
        return self.linear(out, f"{at}.out")

    def mlp(self, at: str, x: Any) -> Any:
        return self.linear(op.multiply(op.swish(self.linear(x, f"{at}.up", 0)), self.linear(x, f"{at}.up", 1)), f"{at}.down")

    def cached(self, name: str, new: Any, layer: Attention) -> Any:
        """The state with the new rows appended. They stay."""
        shape = ov.PartialShape([-1, layer.kv_heads, -1, layer.head_dim])
        info = ov.op.util.VariableInfo()
        info.data_shape, info.data_type, info.variable_id = shape, ov.Type.f32, name
        variable = ov.op.util.Variable(info)
        empty = op.constant(np.zeros((1, layer.kv_heads, 0, layer.head_dim), np.float32))
        past = op.gather(op.read_value(empty, variable), self.beam, number(0))
        every = op.concat([past, new], -2)
        self.sinks.append(op.assign(every, variable))
        return every

    def grouped(self, x: Any, layer: Attention) -> Any:
        """Repeats each kv head for every query head that reads it."""
        if (times := layer.heads // layer.kv_heads) == 1:
            return x
        wide = op.broadcast(op.unsqueeze(x, number(2)), numbers(1, 1, times, 1, 1), broadcast_spec="BIDIRECTIONAL")
        return op.reshape(wide, numbers(0, layer.heads, -1, layer.head_dim), special_zero=True)

    def seen(self, keys: Any) -> Any:
        """The additive mask [texts, 1, rows, keys]: 0 for visible keys, elsewhere a value that softmax turns into 0."""
        length = op.squeeze(op.gather(op.shape_of(keys), numbers(2), number(0)), number(0))
        slots = op.range(number(0), length, number(1), "i64")
        allowed = op.less_equal(op.unsqueeze(slots, numbers(0, 1, 2)), op.unsqueeze(self.positions, numbers(1, 3)))
        return op.select(allowed, number(np.float32(0)), number(np.finfo(np.float32).min))

    def turns(self, layer: Attention) -> tuple[Any, Any]:
        """Cosine and sine of every row's angles: [texts, 1, rows, head size]."""
        rotary = layer.rotary
        assert rotary is not None
        frequencies = op.constant(np.array(rotary.frequencies, dtype=np.float32)[None, None, None])
        angles = op.multiply(op.convert(op.unsqueeze(self.positions, numbers(1, 3)), "f32"), frequencies)
        both = op.concat([angles, angles], -1)
        scale = number(np.float32(rotary.scale))
        cos, sin = (op.multiply(turn(both), scale) for turn in (op.cos, op.sin))
        return cos, sin

    def turned(self, x: Any, size: int) -> Any:
        low = op.slice(x, numbers(0), numbers(size // 2), numbers(1), numbers(3))
        high = op.slice(x, numbers(size // 2), numbers(2**31 - 1), numbers(1), numbers(3))
        swapped = op.concat([op.multiply(high, number(np.float32(-1))), low], -1)
        return op.add(op.multiply(x, self.cos), op.multiply(swapped, self.sin))

    def norm(self, x: Any, name: str, norm: Norm) -> Any:
        mean = op.reduce_mean(op.power(x, number(np.float32(2))), numbers(-1), keep_dims=True)
        root = op.sqrt(op.add(mean, number(np.float32(norm.eps))))
        return op.multiply(self.weight(f"{name}.weight"), op.multiply(x, op.divide(number(np.float32(1)), root)))

    def linear(self, x: Any, name: str, part: int = 0) -> Any:
        out = self.product(x, self.weight(f"{name}.weight", part))
        return op.add(out, self.weight(f"{name}.bias", part)) if f"{name}.bias" in self.found.sources else out

    def product(self, x: Any, weight: Any) -> Any:
        return op.matmul(x, weight, False, True)

    def weight(self, name: str, part: int = 0) -> Any:
        """One stored tensor. Matrices are in the run's dtype, vectors in float32."""
        stored = self.found.sources[name].names[part]
        tensor = self.found.tensors.read(stored)
        kind = self.found.dtype if tensor.ndim > 1 else DTYPES["float32"]
        data = np.ascontiguousarray(tensor.astype(kind))
        self.held.append(data)
        node = op.constant(
            ov.Tensor(data.view(np.uint16) if kind.itemsize == 2 else data, tensor.shape, getattr(ov.Type, KINDS[name_of(kind)])),
            shared_memory=True,
        )
        return node if kind == np.float32 else op.convert(node, "f32")


def number(value: Any) -> Any:
    return op.constant(np.array(value))


def numbers(*values: int) -> Any:
    return op.constant(np.array(values, dtype=np.int64))
