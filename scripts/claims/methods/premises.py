"""Methods that were not built, because what they rest on was measured first: neighbouring layers that store much the same (MiniCache),
and blocks of attention that the last rows foretell (FlexPrefill).

Akide Liu, Jing Liu, Zizheng Pan, Yefei He, Gholamreza Haffari, Bohan Zhuang: MiniCache: KV Cache Compression in Depth Dimension for
Large Language Models, 2024, arXiv 2405.14366.
Xunhao Lai, Jianqiao Lu, Yao Luo, Yiyuan Ma, Xun Zhou: FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient
Long-Sequence Inference, 2025, arXiv 2502.20766.
"""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from redraft.models import loader
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import Lab

CONTEXT, SCORED, TEXTS = 256, 128, 8  # tokens, tokens, texts
LATER, KEPT = 0.6, 0.05  # MiniCache: weight of the later layer, part of the tokens that are not merged
BLOCK, ROWS, MASS, TRUSTED, LEAST = 64, 1024, 0.9, 0.1, 2  # FlexPrefill: tokens, tokens of a text, gamma, tau, blocks
FILES = ("tarfile", "argparse", "mailbox", "inspect", "turtle", "typing", "pdb", "doctest")


def calibration() -> list[Path]:
    """Files that no task of the bench takes its text from."""
    return [Path(sysconfig.get_path("stdlib"), f"{name}.py") for name in FILES]


@functools.cache
def model(lab: Lab, attention: str = "sdpa") -> Any:
    """The model in transformers, float32, whose caches can be read and changed."""
    import torch
    import transformers

    torch.set_num_threads(lab.threads)
    transformers.utils.logging.disable_progress_bar()
    folder = loader.resolve(lab.model)
    found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, local_files_only=True
    )
    return found.eval().requires_grad_(False)


def texts(lab: Lab, length: int, usual: int) -> list[Any]:
    import torch

    spelled = [lab.llm.tokenizer.encode(path.read_text(encoding="utf-8"))[:length] for path in calibration()]
    return [torch.tensor([ids]) for ids in spelled[: lab.count(usual)] if len(ids) == length]


# ---- MiniCache


def merged(x: Any, y: Any, way: str) -> tuple[Any, Any]:
    """x, y: [1, heads, T, D] of the later and the earlier layer of a pair -> both as they are read back. slerp: one direction for both,
    each with its own length; mean: one vector for both. The tokens of a head that differ most stay."""
    import torch

    u, v = (one / one.norm(dim=-1, keepdim=True).clamp_min(1e-9) for one in (x, y))
    angle = (u * v).sum(-1, keepdim=True).clamp(-1 + 1e-6, 1 - 1e-6).arccos()
    if way == "slerp":
        shared = (((1 - LATER) * angle).sin() * v + (LATER * angle).sin() * u) / angle.sin()
        later, earlier = shared * x.norm(dim=-1, keepdim=True), shared * y.norm(dim=-1, keepdim=True)
    else:
        later = earlier = (x + y) / 2
    stays = angle >= torch.quantile(angle, 1 - KEPT, dim=2, keepdim=True)
    return torch.where(stays, x, later), torch.where(stays, y, earlier)


def nats(lab: Lab, ids: Any, pairs: tuple[int, ...], way: str) -> float:
    """The mean log-probability of the last SCORED tokens, over a cache in which each layer of `pairs` is merged with that before it."""
    import torch
    import transformers

    own, cache = model(lab), transformers.DynamicCache()
    with torch.inference_mode():
        own.model(ids[:, :CONTEXT], past_key_values=cache)
        for layer in pairs:
            one, other = cache.layers[layer], cache.layers[layer - 1]
            one.keys, other.keys = merged(one.keys, other.keys, way)
            one.values, other.values = merged(one.values, other.values, way)
        logits = own(ids[:, CONTEXT:], past_key_values=cache).logits[0, :-1].log_softmax(-1)
    return float(logits.gather(1, ids[0, CONTEXT + 1 :, None]).mean())


def deep_pairs(lab: Lab) -> tuple[int, ...]:
    count = len(lab.llm.spec.layers)
    return tuple(range(count // 2 + 1, count, 2))


def alike(lab: Lab) -> Found:
    """Of each pair of the deeper half the mean cosine of keys and values."""
    import torch
    import transformers

    cosines = []
    for ids in texts(lab, CONTEXT + SCORED, 4):
        cache = transformers.DynamicCache()
        with torch.inference_mode():
            model(lab).model(ids, past_key_values=cache)
        layers = [(one.keys, one.values) for one in cache.layers]
        near = torch.nn.functional.cosine_similarity
        cosines.append([[float(near(a, b, dim=-1).mean()) for a, b in zip(layers[i], layers[i - 1], strict=True)] for i in deep_pairs(lab)])
    each = np.mean(cosines, 0)  # [pairs, keys and values]
    spans = [f"{name} {each[:, i].min():.2f} to {each[:, i].max():.2f}" for i, name in enumerate(("keys", "values"))]
    return Found(list(each.mean(1)), ["cosines of pairs: " + ", ".join(spans)])


def merging(lab: Lab) -> Found:
    every = deep_pairs(lab)
    found = [(nats(lab, ids, (), "slerp"), nats(lab, ids, every[-1:], "slerp"), nats(lab, ids, every, "slerp"))
             for ids in texts(lab, CONTEXT + SCORED, TEXTS)]  # fmt: skip
    return Found(
        [all_ - full for full, _, all_ in found], [f"the last pair alone: {np.mean([one - full for full, one, _ in found]):+.2f} nats"]
    )


def slerp(lab: Lab) -> Found:
    last = deep_pairs(lab)[-1:]
    ways = np.array([[nats(lab, ids, last, way) for way in ("slerp", "mean")] for ids in texts(lab, CONTEXT + SCORED, TEXTS)])
    return Found(list(ways[:, 0] - ways[:, 1]))


# ---- FlexPrefill


def chosen(weights: Any, estimated: Any) -> tuple[Any, bool]:
    """Of one head: (blocks that are computed bool[n, n], whether the pattern is that of pooled queries). weights: f32[T, T]; estimated:
    f32[n, n], attention of means of queries to means of keys, each over a block."""
    import torch

    count = len(estimated)
    probe = weights[-BLOCK:]
    real, guess = probe.mean(0).reshape(count, BLOCK).sum(1), estimated[-1]
    middle = (real + guess) / 2
    apart = sum(float((p * (p / middle).clamp_min(1e-12).log()).sum()) / 2 for p in (real, guess))
    active = torch.eye(count, dtype=torch.bool)
    active[:, 0] = True
    if max(apart, 0.0) ** 0.5 < TRUSTED:
        flat = estimated.flatten().sort(descending=True)
        needed = int((flat.values.cumsum(0) < MASS * count).sum()) + 1
        active.view(-1)[flat.indices[:needed]] = True
        return active.tril(), True
    offsets = torch.arange(len(weights) - BLOCK, len(weights))[:, None] - torch.arange(len(weights))
    slashes = torch.zeros(len(weights)).index_add_(0, offsets.clamp_min(0).flatten(), torch.where(offsets >= 0, probe, 0).flatten()) / BLOCK
    rows = torch.arange(count)
    for scores, columns in ((probe.mean(0), True), (slashes, False)):
        needed = int((scores.sort(descending=True).values.cumsum(0) < MASS * scores.sum()).sum()) + 1
        best = scores.reshape(count, BLOCK).sum(1).topk(min(count, max(LEAST, needed // BLOCK + 1))).indices
        for i in best.tolist():
            if columns:
                active[:, i] = True
            else:
                active[rows[i:], rows[: count - i]] = True
    return active.tril(), False


@functools.cache
def covered(lab: Lab) -> np.ndarray:
    """f64[texts, 4]: means over heads of the part of all attention within the chosen blocks, within as many blocks of first and near
    tokens, of the part of blocks that is computed, and of heads with the pattern of pooled queries."""
    import torch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    own, found = model(lab, "eager"), []
    count = ROWS // BLOCK
    causal = torch.ones(count, count).tril() > 0

    def measure(module: Any, given: Any, out: Any) -> None:
        x, (cos, sin) = given["hidden_states"], given["position_embeddings"]
        shape = (1, ROWS, -1, module.head_dim)
        q, k = apply_rotary_pos_emb(module.q_proj(x).view(shape).transpose(1, 2), module.k_proj(x).view(shape).transpose(1, 2), cos, sin)
        q, k = (one[0].reshape(one.shape[1], count, BLOCK, -1).mean(2) for one in (q, k))
        k = k.repeat_interleave(len(q) // len(k), 0)
        pooled = (q @ k.transpose(1, 2) * module.scaling).masked_fill(~causal, -torch.inf).softmax(-1)
        for weights, estimated in zip(out[1][0], pooled, strict=True):
            active, by_pools = chosen(weights, estimated)
            blocks = weights.reshape(count, BLOCK, count, BLOCK).sum((1, 3)) / ROWS
            near = torch.zeros_like(active)
            near[:, 0] = True
            for offset in range(count):  # whole diagonals, then a part of one
                fresh = [(i, i - offset) for i in range(offset, count) if not near[i, i - offset]]
                for i, j in fresh[: max(0, int(active.sum() - near.sum()))]:
                    near[i, j] = True
            heads.append((float(blocks[active].sum()), float(blocks[near].sum()), float(active.sum() / causal.sum()), float(by_pools)))

    for ids in texts(lab, ROWS, 6):
        heads: list[tuple[float, ...]] = []
        holds = [one.self_attn.register_forward_hook(lambda m, a, g, out: measure(m, g, out), with_kwargs=True) for one in own.model.layers]
        try:
            with torch.inference_mode():
                own.model(ids, use_cache=False)
        finally:
            for hold in holds:
                hold.remove()
        found.append(np.mean(heads, 0))
    return np.array(found)


def coverage(lab: Lab) -> Found:
    found = covered(lab)
    return Found(list(found[:, 0]), [f"{found[:, 2].mean():.0%} of the blocks are computed; {found[:, 3].mean():.0%} of heads trust pooled "
                                     "queries; no time is saved without a kernel for sparse blocks"])  # fmt: skip


def adaptive(lab: Lab) -> Found:
    found = covered(lab)
    return Found(list(found[:, 0] - found[:, 1]), [f"first and near blocks cover {found[:, 1].mean():.2f}"])


CLAIMS = (
    Claim("minicache-premise", ("codec=minicache",), "Deeper neighbouring layers store vectors of one direction (here: cosine 0.5)",
          "keys and values of SmolLM2, each pair of layers a sample", "mean cosine of a pair", alike, border=0.5),
    Claim("minicache-loss", ("codec=minicache",), "Merging the layers of the deeper half in pairs is nearly free (here: 0.1 nats)",
          "cache of 256 tokens merged by SLERP, 5 % of the tokens kept, the next 128 scored", "nats a token, change", merging, border=-0.1),
    Claim("minicache-slerp", ("codec=minicache",), "One direction with two lengths keeps more than the mean of both",
          "the last pair of layers, the same texts", "nats a token, SLERP minus mean", slerp),
    Claim("flexprefill-coverage", ("read=flexprefill",), "Blocks chosen from the last rows hold 90 % of the attention of all rows",
          "texts of 1,024 tokens, blocks of 64, gamma 0.9, tau 0.1", "part of the attention, mean over heads", coverage, border=0.9),
    Claim("flexprefill-adaptive", ("read=flexprefill",), "They hold more than the first and nearest blocks, as many of them",
          "the same", "part of the attention, minus that of fixed blocks", adaptive),
)  # fmt: skip
