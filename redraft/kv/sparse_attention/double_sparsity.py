"""Reads the tokens whose keys fit the query best on a few channels, the ones that decided most in a calibration.

Shuo Yang, Ying Sheng, Joseph E. Gonzalez, Ion Stoica, Lianmin Zheng: Post-Training Sparse Attention with Double Sparsity, 2024,
arXiv 2408.07092.

Once for a model:
1. Run texts; of each layer and head, average |q_c * k_c| of the same token over all tokens, for each channel c, behind the rotation.
2. The channels with the largest averages are the labels of that head.
While it runs:
3. Keep the label channels of every key beside it.
4. Score what a row sees by its query and the labels alone; each query head reads the `tokens` largest, the text's first and the
   row's own token always among them. The first layers read all.

Differs: labels are chosen for each kv head, by the mean over its query heads, and kept in the dtype of the cache, not in 4 bits;
they are stored for the first layers too; nothing is offloaded, so the next layer's query is not predicted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from hashlib import sha256
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from redraft.card import Card, Guarantee
from redraft.config import SamplingParams
from redraft.core.batch import Batch
from redraft.core.plan import Work
from redraft.core.sequence import NEVER, Request, Sequence
from redraft.core.spec import Attention
from redraft.core.tree import EMPTY
from redraft.errors import CheckpointError, InvalidInput
from redraft.ops.format import PAGE, Array, Arrays
from redraft.options import Options, number

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from redraft.models.runner import Runner
    from redraft.ops.backend import Backend, Products

METHOD = "double-sparsity"
PIECE = 512  # tokens of a text that are run together
SAMPLE = 1 << 16  # bytes of each weight that enter the model's hash


@dataclass(frozen=True)
class DoubleSparsity(Options):
    """tokens: that a query head reads; factor: of a key's channels one in so many is a label; dense: first layers that read all;
    sinks: first slots that are always read; profile: the file of a calibration, None: where `redraft calibrate` puts it.

    With the embedded model, calibrated on 16,384 tokens of code, a quarter of the channels finds 0.53 to 0.55 of the true top n / 8
    tokens, random channels 0.38; of the top n / 16 it is 0.47 to 0.50 against 0.31.
    """

    tokens: int = 256
    factor: int = number(4, ge=1)
    dense: int = number(2, ge=0)
    sinks: int = number(1, ge=0)
    profile: Path | None = None

    card: ClassVar[Card] = Card(
        "Double Sparsity",
        "Yang, Sheng, Gonzalez, Stoica, Zheng, Post-Training Sparse Attention with Double Sparsity, 2024, arXiv 2408.07092",
        Guarantee.LOSSY,
        needs="a calibration of the model, once: redraft calibrate",
        deviates="labels for each kv head, in the dtype of the cache; no offloading",
        summary="Reads tokens by calibrated channels; long contexts",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < self.sinks + 2:
            raise InvalidInput(
                f"{METHOD}:tokens={self.tokens}: must be {self.sinks + 2} or more, room for {self.sinks} sinks, a row's own token"
                " and one to choose"
            )

    def open(self, runner: Runner) -> Labels:
        """InvalidInput where the profile lacks, is another model's, or is coarser than a channel; CheckpointError where it is damaged."""
        count = runner.spec.head_dim // self.factor
        if not count:
            raise InvalidInput(f"{METHOD}:factor={self.factor}: keys have {runner.spec.head_dim} channels, so it must be that or less")
        model = model_hash(runner)
        path = self.profile.expanduser() if self.profile else place(model)
        if not path.exists():
            of = str(runner.source or "MODEL")
            raise InvalidInput(f"{METHOD}: no profile {path}; make one with: redraft calibrate {of} --method {METHOD} --texts FILE")
        profile = Profile.load(path)
        if profile.model != model:
            raise InvalidInput(f"{METHOD}:profile={path}: made for the model with hash {profile.model}, this one has {model}")
        return Labels(profile.channels(count).to(runner.backend.device), self.tokens, self.dense, self.sinks)

    @staticmethod
    def calibrate(runner: Runner, texts: Seq[Seq[int]], samples: int = 256) -> Profile:
        """Token ids of texts -> Profile. Long texts are cut into pieces of 512 tokens; of more than `samples` pieces so many are run,
        evenly from all. InvalidInput where there is no token."""
        from redraft.models.runner import Runner

        size = min(PIECE, runner.spec.context)
        pieces = [list(text[i : i + size]) for text in texts for i in range(0, len(text), size)]
        if not pieces or samples < 1:
            raise InvalidInput(f"{METHOD}: {len(pieces)} pieces of text and samples = {samples}: a calibration takes one at least")
        chosen = [pieces[i * len(pieces) // samples] for i in range(samples)] if len(pieces) > samples else pieces
        meter = _Meter(runner)
        own = Runner(runner.spec, runner.weights, cast("Backend", meter), -(-size // PAGE))
        for i, tokens in enumerate(chosen):  # 1.
            request = Request(METHOD, tokens, SamplingParams())
            seq = Sequence(i, request, 0, tokens, len(tokens), seed=0, sync_point=NEVER)
            own.memory.open(seq)
            work = [Work(seq, len(tokens))]
            own.forward(Batch.pack(work, [EMPTY], own.memory.reserve(work, [EMPTY])))
            own.memory.free(seq)
        tokens_run = sum(map(len, chosen))
        return Profile((meter.sums / tokens_run).float().cpu(), model_hash(runner), len(texts), tokens_run)


@dataclass(frozen=True, eq=False)
class Profile:
    """scores: f32 [L, K, D], the mean |q_c * k_c| of every channel; model: the hash of the model it was made for; texts, tokens: how
    many it was made from."""

    scores: Tensor
    model: str
    texts: int
    tokens: int

    def channels(self, count: int) -> Tensor:
        """i64 [L, K, count], ascending: the channels with the largest scores, of equal ones the lower."""
        order = self.scores.sort(dim=-1, descending=True, stable=True).indices  # 2.
        return order[..., :count].sort(-1).values

    def save(self, path: Path | None = None) -> Path:
        """Writes a safetensors file, by default where `open` looks for it; returns its path."""
        from safetensors.torch import save_file

        path = path or place(self.model)
        path.parent.mkdir(parents=True, exist_ok=True)
        reported = {"method": METHOD, "model": self.model, "texts": str(self.texts), "tokens": str(self.tokens)}
        half = path.with_name(f"{path.name}.{os.getpid()}")
        save_file({"scores": self.scores.contiguous()}, half, reported)
        half.replace(path)  # nobody ever meets half a file
        return path

    @classmethod
    def load(cls, path: Path) -> Profile:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                reported = file.metadata() or {}
                if reported.get("method") != METHOD:
                    raise CheckpointError(f"{path}: not a profile of {METHOD}")
                found = cls(file.get_tensor("scores"), reported["model"], int(reported["texts"]), int(reported["tokens"]))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: not a whole profile of {METHOD}: {' '.join(str(error).split())}") from None
        if not found.scores.any():
            raise CheckpointError(f"{path}: all scores are 0: calibrate again")
        return found


@dataclass(frozen=True, eq=False)
class Labels:
    """The method, opened. channels: i64 [L, K, c]."""

    channels: Tensor
    tokens: int
    dense: int
    sinks: int

    grid: ClassVar[int] = 0

    @cached_property
    def name(self) -> str:
        return f"{METHOD}-{sha256(str(self.channels.tolist()).encode()).hexdigest()[:16]}"

    @property
    def least(self) -> int:
        return self.tokens

    def arrays(self, head_dim: int, dtype: torch.dtype) -> dict[str, Array]:
        return {"labels": Array((PAGE, self.channels.shape[-1]), dtype)}

    def fill(self, index: int, keys: Tensor) -> dict[str, Tensor]:
        return {"labels": keys.gather(2, self.channels[index].expand(len(keys), -1, -1))}  # 3.

    def fold(self, keys: Tensor) -> dict[str, Tensor]:
        """Nothing: labels are known when a key is."""
        return {}

    def select(self, index: int, q: Tensor, held: Arrays, seen: Tensor, where: Tensor, at: Tensor, products: Products) -> Tensor:
        """[K, G, R, n], or [K, 1, R, n] in the layers that read all."""

        if index < self.dense:
            return seen[:, None]
        chosen = self.channels[index][:, None, None].expand(*q.shape[:3], -1)
        scores = products(q.gather(3, chosen).flatten(1, 2), held["labels"].flatten(1, 2)).unflatten(1, q.shape[1:3])  # 4.
        scores = scores.masked_fill((where < self.sinks)[:, None, None], inf)  # of the text: a lane may begin later
        scores = scores.masked_fill((where[:, None] == at[:, None])[:, None], inf).masked_fill(~seen[:, None], -inf)
        last = scores.topk(min(self.tokens, scores.shape[-1])).values[..., -1:]
        above, equal = scores > last, scores == last
        room = self.tokens - above.sum(-1, keepdim=True)  # of equal ones the lower slots
        found: Tensor = seen[:, None] & (above | (equal & (equal.cumsum(-1) <= room)))
        return found


class _Meter:
    """The runner's backend, which adds up |q_c * k_c| of every token on its way into attention. sums: f64 [L, K, D]."""

    def __init__(self, runner: Runner) -> None:
        import torch

        spec, self._backend = runner.spec, runner.backend
        self.sums = torch.zeros(len(spec.attention), spec.kv_heads, spec.head_dim, dtype=torch.float64, device=self._backend.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def run(self, *segment: Any) -> None:
        """Every layer is run operation by operation, so that its attention comes by here."""

    def attend(self, index: int, layer: Attention, q: Tensor, k: Tensor, v: Tensor, pool: Any, plan: Any) -> Tensor:
        groups = q.unflatten(1, (layer.kv_heads, -1))
        self.sums[index] += (groups.abs().double().mean(2) * k.abs().double()).sum(0)
        return self._backend.attend(index, layer, q, k, v, pool, plan)


# ---- which model it was made for


def place(model: str) -> Path:
    """Where the profile of a model lies unless a path is given: in REDRAFT_CACHE, else XDG_CACHE_HOME/redraft, else
    ~/.cache/redraft."""
    own, all_of_them = os.environ.get("REDRAFT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    root = Path(own) if own else (Path(all_of_them) if all_of_them else Path.home() / ".cache") / "redraft"
    return root.expanduser() / METHOD / f"{model}.safetensors"


def model_hash(runner: Runner) -> str:
    """sha256 over config.json and, of each stored tensor in the order of names, its name, dtype, shape and first rows (64 KiB of
    them): a checkpoint of any size takes well under a second. Neither sharding nor the dtype in which it runs enters. Weights
    from elsewhere are hashed as they are in memory, with the spec."""
    import torch

    digest = sha256()
    if runner.source is None:
        digest.update(repr(runner.spec).encode())
        weights = _in_memory(runner.weights)
    else:
        digest.update((runner.source / "config.json").read_bytes())
        weights = _in_files(runner.source)
    for name, shape, rows in weights:
        digest.update(f"{name} {rows.dtype} {shape}".encode())
        digest.update(rows.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


Weight = tuple[str, tuple[int, ...], "Tensor"]  # name, shape, first rows


def _in_files(source: Path) -> Iterator[Weight]:
    from redraft.models import loader

    stored = loader.inspect(source).tensors
    for name, info in sorted(stored.tensors.items()):
        if info.shape:
            yield name, info.shape, stored.read(name, slice(0, _sampled(stored.read(name, slice(0, 1)))))


def _in_memory(value: Any, name: str = "weights") -> Iterator[Weight]:
    from torch import Tensor

    if isinstance(value, Tensor):
        yield name, tuple(value.shape), _first_rows(value.to_dense() if value.is_mkldnn else value)
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from _in_memory(part, f"{name}.{i}")
    elif is_dataclass(value):
        for field in fields(value):
            yield from _in_memory(getattr(value, field.name), f"{name}.{field.name}")


def _first_rows(stored: Tensor) -> Tensor:
    return stored[: _sampled(stored[:1])]


def _sampled(row: Tensor) -> int:
    """How many rows like the first are looked at."""
    return max(1, SAMPLE // max(1, row.nbytes))
