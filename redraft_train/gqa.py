"""Makes a checkpoint with fewer kv heads, from the keys and values that a model makes of a text. No training.

    python -m redraft_train.gqa MODEL --kv-heads 1 --out FOLDER

Hao Yu, Zelan Yang, Shen Li, Yong Li, Jianxin Wu: Effectively Compress KV Heads for LLM, 2024, arXiv 2406.07056.

1. Neighbouring kv heads form groups, each of which becomes one head.
2. Values: the joined values of a group are projected to their first principal directions. The projection goes into the rows of v_proj,
   its transpose into the columns of o_proj of each query head.
3. Keys turn with their positions, so heads may mix only within a pair of dimensions that turns together. Each pair is a complex number,
   and a turn is a factor. The new pair is the best complex combination of those of the group; q_proj gets the conjugate factors.

With one head a group nothing changes. Where the heads of a group span no more than one head, nothing is lost.
Differs: keys are combined within pairs before the turn (the paper projects turned keys with a matrix at run time); groups are
neighbours, not similar heads; nothing is tuned afterwards.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from redraft.bench.tasks import pieces, sources
from redraft.errors import InvalidInput, RedraftError, Unsupported
from redraft.models import loader
from redraft.models.tokenizer import Tokenizer
from redraft_train.folder import TOKENIZER

FAMILIES = "llama", "mistral", "qwen2"  # whose keys turn in halves of whole heads, without a norm
POOLS = "svd", "mean"
LENGTH = 512  # tokens of a piece of the calibration text


@dataclass(frozen=True, eq=False)
class Maps:
    """How t heads of D dimensions become one. values: f64[D, t * D], from joined values to the new ones, and back: f64[t, D, D]. keys:
    c128[D / 2, t], from the pairs of the heads to the new pair, and turned: c128[D / 2, t], from the new pair to those of the heads."""

    values: Tensor
    back: Tensor
    keys: Tensor
    turned: Tensor

    @classmethod
    def same(cls, size: int) -> Maps:
        one, eye = torch.ones(size // 2, 1, dtype=torch.complex128), torch.eye(size, dtype=torch.float64)
        return cls(eye, eye[None], one, one)

    @classmethod
    def mean(cls, heads: int, size: int) -> Maps:
        """The mean of the heads, as grouped attention is usually made."""
        eye = torch.eye(size, dtype=torch.float64)
        one = torch.ones(size // 2, heads, dtype=torch.complex128)
        return cls(eye.repeat(1, heads) / heads, eye.expand(heads, size, size), one / heads, one)

    @classmethod
    def svd(cls, values: Tensor, keys: Tensor) -> Maps:
        """values: f64[t * D, t * D], second moments of joined values; keys: c128[D / 2, t, t], E[z z^H] of each pair."""
        size, heads = 2 * len(keys), keys.shape[1]
        directions = torch.linalg.eigh(values).eigenvectors[:, -size:]
        best = torch.linalg.eigh(keys).eigenvectors[:, :, -1]
        return cls(directions.T, directions.reshape(heads, size, size), best.conj(), best)


def joined(weight: Tensor, bias: Tensor | None) -> Tensor:
    """f64[rows, hidden + 1]: the bias as one more column, for an input that ends in 1."""
    column = torch.zeros(len(weight)) if bias is None else bias
    return torch.cat([weight.double(), column.double()[:, None]], 1)


def pairs(rows: Tensor, size: int) -> Tensor:
    """c128[heads, D / 2, columns] of rows f64[heads * D, columns]: a dimension of the first half of a head with that of the second."""
    low, high = rows.reshape(-1, 2, size // 2, rows.shape[1]).unbind(1)
    return torch.complex(low, high)


def rows_of(found: Tensor) -> Tensor:
    """The inverse of `pairs`."""
    return torch.stack([found.real, found.imag], 1).reshape(-1, found.shape[-1])


@dataclass(frozen=True, eq=False)
class Heads:
    """The projections of one attention, f64: q [heads * D, hidden + 1], k and v [kv_heads * D, hidden + 1], all with their bias, and o
    [hidden, heads * D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    size: int

    def maps(self, moments: Tensor, groups: int, pool: str) -> list[Maps]:
        """Those of each group. moments: f64[hidden + 1, hidden + 1], E[x x^T] of the inputs."""
        count = len(self.k) // self.size
        heads = count // groups
        if heads == 1:
            return [Maps.same(self.size)] * groups
        if pool == "mean":
            return [Maps.mean(heads, self.size)] * groups
        v, k = self.v.reshape(groups, heads * self.size, -1), pairs(self.k, self.size).reshape(groups, heads, self.size // 2, -1)
        mixed = moments.to(torch.complex128)
        return [Maps.svd(v[i] @ moments @ v[i].T, torch.einsum("ajx,xy,bjy->jab", k[i], mixed, k[i].conj())) for i in range(groups)]

    def joined_by(self, maps: Seq[Maps]) -> Heads:
        groups, size = len(maps), self.size
        values = torch.stack([one.values for one in maps]) @ self.v.reshape(groups, -1, self.v.shape[1])
        z = pairs(self.k, size).reshape(groups, -1, size // 2, self.k.shape[1])
        keys = torch.einsum("gjt,gtjx->gjx", torch.stack([one.keys for one in maps]), z)
        heads = len(self.q) // size // (groups * z.shape[1])  # query heads of a kv head
        q = pairs(self.q, size).reshape(groups, z.shape[1], heads, size // 2, -1)
        turned = torch.stack([one.turned for one in maps]).conj()
        queries = torch.einsum("gjt,gthjx->gthjx", turned, q).reshape(-1, size // 2, self.q.shape[1])
        o = self.o.reshape(len(self.o), groups, z.shape[1], heads, size)
        out = torch.einsum("xgthd,gtde->xgthe", o, torch.stack([one.back for one in maps]))
        return Heads(rows_of(queries), rows_of(keys), values.reshape(-1, self.v.shape[1]), out.reshape(self.o.shape), size)


def moments(model: Any, texts: Iterable[Seq[int]]) -> list[Tensor]:
    """f64[hidden + 1, hidden + 1] of each layer: E[x x^T] of the inputs of its attention, each with a last dimension of 1."""
    hidden = model.config.hidden_size
    sums = [torch.zeros(hidden + 1, hidden + 1, dtype=torch.float64) for _ in model.model.layers]
    rows = 0

    def keep(own: Tensor) -> Any:
        def add(module: Any, given: tuple[Tensor, ...]) -> None:
            x = given[0].reshape(-1, hidden).float()
            x = torch.cat([x, torch.ones(len(x), 1)], 1)
            own.add_((x.T @ x).double())

        return add

    holds = [layer.self_attn.k_proj.register_forward_pre_hook(keep(own)) for layer, own in zip(model.model.layers, sums, strict=True)]
    try:
        with torch.inference_mode():
            for ids in texts:
                model.model(torch.tensor([list(ids)]), use_cache=False)
                rows += len(ids)
    finally:
        for hold in holds:
            hold.remove()
    if not rows:
        raise InvalidInput("texts: too short, no piece to calibrate on")
    return [own / rows for own in sums]


def check(config: Any, kv_heads: int) -> None:
    """Unsupported or InvalidInput for a model whose heads cannot be joined, or not to so many."""
    if config.model_type not in FAMILIES:
        raise Unsupported(f"model_type = {config.model_type!r}: kv heads can be joined of {', '.join(FAMILIES)}")
    if kv_heads < 1 or config.num_key_value_heads % kv_heads:
        raise InvalidInput(f"kv-heads = {kv_heads}: must divide the model's {config.num_key_value_heads}")


def compress(model: Any, texts: Iterable[Seq[int]], kv_heads: int, pool: str = "svd") -> None:
    """Changes a model of transformers in place. texts: token ids to calibrate on."""
    check(model.config, kv_heads)
    size = model.model.layers[0].self_attn.head_dim
    for layer, found in zip(model.model.layers, moments(model, texts), strict=True):
        own = layer.self_attn
        q, k, v = (joined(one.weight.data, one.bias) for one in (own.q_proj, own.k_proj, own.v_proj))
        heads = Heads(q, k, v, own.o_proj.weight.data.double(), size)
        made = heads.joined_by(heads.maps(found, kv_heads, pool))
        for module, rows in ((own.q_proj, made.q), (own.k_proj, made.k), (own.v_proj, made.v)):
            module.weight = torch.nn.Parameter(rows[:, :-1].to(module.weight.dtype).contiguous(), requires_grad=False)
            if module.bias is not None:
                module.bias = torch.nn.Parameter(rows[:, -1].to(module.bias.dtype).contiguous(), requires_grad=False)
            module.out_features = len(rows)
        own.o_proj.weight = torch.nn.Parameter(made.o.to(own.o_proj.weight.dtype).contiguous(), requires_grad=False)
        own.num_key_value_groups = model.config.num_attention_heads // kv_heads
    model.config.num_key_value_heads = kv_heads


def write(source: Path, out: Path, kv_heads: int, paths: Seq[Path] = (), pool: str = "svd", count: int = 16) -> None:
    """Reads a checkpoint's folder and writes that with fewer kv heads. paths: texts to calibrate on, else parts of the standard library;
    count: pieces of them."""
    check(transformers.AutoConfig.from_pretrained(source, local_files_only=True), kv_heads)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True).eval()
    tokenizer = Tokenizer(source)
    length = min(LENGTH, model.config.max_position_embeddings)
    spelled = [tokenizer.encode(text, special=False) for texts in sources(paths).values() for text in texts]
    compress(model, pieces(spelled, length, count), kv_heads, pool)
    model.save_pretrained(out)
    for pattern in TOKENIZER:
        for file in source.glob(pattern):
            shutil.copy(file, out / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m redraft_train.gqa", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a checkpoint, or a name")
    parser.add_argument("--kv-heads", type=int, required=True, help="of the new model; must divide those of the old one")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="to calibrate on; default: parts of the standard library")
    parser.add_argument("--pool", choices=POOLS, default="svd", help="mean: the mean of the heads, to compare")
    given = parser.parse_args()
    try:
        source = loader.resolve(given.model)
        if not source.is_dir():
            raise Unsupported(f"{source}: a GGUF file; kv heads are joined of folders only")
        write(source, given.out, given.kv_heads, given.texts, given.pool)
    except RedraftError as error:
        parser.error(str(error))
    print(f"wrote {given.out}: {json.loads((given.out / 'config.json').read_text())['num_key_value_heads']} kv heads")


if __name__ == "__main__":
    main()
