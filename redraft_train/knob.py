"""Trains the vector of `--steer context-knob`: a direction whose coordinate says whether a model follows its context or what it knows.

    python -m redraft_train.knob MODEL --out FOLDER

The model is frozen. Learned are a unit vector u and one constant for each intent, at the output of one layer, by the
cross-entropy on the intended answer of fact conflicts, half of which are held out. The layer is the first at which the state of a
prompt's last row, taken from a prompt with the words of the other intent, changes half as many answers as at the best layer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from redraft_train.conflicts import Conflict, conflicts, facts, halves

METHOD = "context-knob"
GROUP = 16  # prompts that run together
ENOUGH = 0.5  # of the most changed answers, at the chosen layer


class Asked(NamedTuple):
    """Prompts of one group: the cached keys and values of all rows but the last, and what runs the last ones."""

    cache: list[tuple[Any, Any]]
    last: Any
    mask: Any
    context: Any
    prior: Any


@dataclass(frozen=True)
class Found:
    """layer: at whose output the edit is made; u: f32[hidden], of length 1; context, prior: the constants."""

    layer: int
    u: Any
    context: float
    prior: float


class Frozen:
    """A model of transformers whose last rows run with an edit at the output of a layer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.layers = model.model.layers

    def first(self, answer: str) -> int:
        """The first token of an answer."""
        found: int = self.tokenizer(answer, add_special_tokens=False).input_ids[0]
        return found

    @torch.no_grad()
    def asked(self, prompts: Seq[str], given: Seq[Conflict]) -> list[Asked]:
        from transformers import DynamicCache

        found = []
        for at in range(0, len(prompts), GROUP):
            tokens = [self.tokenizer(text, add_special_tokens=False).input_ids for text in prompts[at : at + GROUP]]
            longest = max(map(len, tokens))
            ids = torch.tensor([[0] * (longest - len(one)) + one for one in tokens])
            mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in tokens])
            cache = DynamicCache()
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, :-1]
            self.model(
                ids[:, :-1], attention_mask=mask[:, :-1], position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            held = [(layer.keys, layer.values) for layer in cache.layers]
            answers = [torch.tensor([self.first(getattr(one, kind)) for one in given[at : at + GROUP]]) for kind in ("context", "prior")]
            found.append(Asked(held, ids[:, -1:], mask, *answers))
        return found

    def run(self, one: Asked, layer: int | None = None, edit: Any = None) -> Any:
        """f32[prompts, V]: the logits after the last rows. edit: h[prompts, hidden] -> h, at the output of `layer`."""
        from transformers import DynamicCache

        def hook(module: Any, given: Any, out: Any) -> Any:
            hidden = out[0] if isinstance(out, tuple) else out
            made = edit(hidden[:, -1])[:, None]
            return (made, *out[1:]) if isinstance(out, tuple) else made

        cache = DynamicCache()
        for i, (keys, values) in enumerate(one.cache):
            cache.update(keys, values, i)
        places = one.mask.sum(1, keepdim=True) - 1
        hold = None if layer is None else self.layers[layer].register_forward_hook(hook)
        try:
            return self.model(one.last, attention_mask=one.mask, position_ids=places, past_key_values=cache, use_cache=True).logits[:, -1]
        finally:
            if hold is not None:
                hold.remove()

    @torch.no_grad()
    def states(self, one: Asked) -> list[Any]:
        """The output of each layer, [prompts, hidden], at the last rows."""
        from transformers import DynamicCache

        found: list[Any] = []
        holds = [
            layer.register_forward_hook(lambda m, g, out: found.append((out[0] if isinstance(out, tuple) else out)[:, -1]))
            for layer in self.layers
        ]
        cache = DynamicCache()
        for i, (keys, values) in enumerate(one.cache):
            cache.update(keys, values, i)
        self.model(one.last, attention_mask=one.mask, position_ids=one.mask.sum(1, keepdim=True) - 1, past_key_values=cache, use_cache=True)
        for hold in holds:
            hold.remove()
        return found


def _prefers(logits: Any, one: Asked) -> Any:
    """bool[prompts]: whether the answer of the context is likelier than the known one."""
    rows = torch.arange(len(logits))
    return logits[rows, one.context] > logits[rows, one.prior]


@torch.no_grad()
def scan(model: Frozen, given: Seq[Conflict]) -> list[float]:
    """For each layer, the share of answers that change sides when the state of the last row comes from the prompt of the other intent."""
    by_context, by_prior = (model.asked([getattr(one, kind) for one in given], given) for kind in ("by_context", "by_prior"))
    changed, total = np.zeros(len(model.layers)), 0
    for a, b in zip(by_context, by_prior, strict=True):
        for target, source in ((a, b), (b, a)):
            own, states = _prefers(model.run(target), target), model.states(source)
            other = _prefers(model.run(source), source)
            total += int((own != other).sum())
            for layer, state in enumerate(states):
                after = _prefers(model.run(target, layer, lambda h, state=state: state), target)
                changed[layer] += int(((after == other) & (own != other)).sum())
    return list(changed / max(1, total))


def chosen(shares: Seq[float]) -> int:
    """The first layer with enough changes. The last one cannot be steered."""
    found = next(i for i, share in enumerate(shares) if share >= ENOUGH * max(shares))
    return min(found, len(shares) - 2)


def train(
    model: Frozen, given: Seq[Conflict], layer: int, *, steps: int = 150, rate: float = 0.02, seed: int = 0, seconds: float = 900
) -> Found:
    """Learns u and both constants on conflicts without words of an intent."""
    torch.manual_seed(seed)
    groups = model.asked([one.prompt for one in given], given)
    states = torch.cat([model.states(one)[layer] for one in groups])
    scale = states.std(0).norm().item() / len(states[0]) ** 0.5 * 4
    u = torch.nn.Parameter(F.normalize(torch.randn(states.shape[1]), dim=0))
    constants = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    optimizer = torch.optim.Adam([u, constants], lr=rate)
    began = time.monotonic()
    for step in range(steps):
        one = groups[step % len(groups)]
        unit, loss = F.normalize(u, dim=0), torch.tensor(0.0)
        for constant, answer in zip(constants * scale, (one.context, one.prior), strict=True):
            logits = model.run(one, layer, lambda h, c=constant, v=unit: h + (c - h @ v)[:, None] * v)
            loss = loss + F.cross_entropy(logits, answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}, constants {(constants * scale).tolist()}", flush=True)
        if time.monotonic() - began > seconds:
            break
    context, prior = (constants * scale).tolist()
    return Found(layer, F.normalize(u, dim=0).detach(), context, prior)


@torch.no_grad()
def shares(model: Frozen, found: Found | None, given: Seq[Conflict]) -> dict[str, float]:
    """Of prompts without words of an intent: the share that answer by the context, without and with the constant of each intent; flipped:
    the share that follow the context at its constant and what they know at the other."""
    sides: dict[str, list[bool]] = {"off": [], "context": [], "prior": []}
    tops: dict[str, list[bool]] = {"context": [], "prior": []}
    for one in model.asked([each.prompt for each in given], given):
        sides["off"] += _prefers(model.run(one), one).tolist()
        if found is None:
            continue
        for name in ("context", "prior"):
            constant = getattr(found, name)
            logits = model.run(one, found.layer, lambda h, c=constant, u=found.u: h + (c - h @ u)[:, None] * u)
            sides[name] += _prefers(logits, one).tolist()
            tops[name] += (logits.argmax(-1) == getattr(one, name)).tolist()
    if found is None:
        return {"off": float(np.mean(sides["off"]))}
    both = np.asarray(sides["context"]) & ~np.asarray(sides["prior"])
    return {
        "off": float(np.mean(sides["off"])),
        "context": float(np.mean(sides["context"])),
        "prior": float(np.mean(sides["prior"])),
        "flipped": float(both.mean()),
        "top_context": float(np.mean(tops["context"])),
        "top_prior": float(np.mean(tops["prior"])),
    }


def known(model: Frozen) -> list[Any]:
    """The facts whose answer is the model's likeliest token."""
    every = facts()
    blank = [Conflict(one.prompt, "", "", one.answer, one.answer, "") for one in every]
    tops = [
        token for one in model.asked([one.prompt for one in every], blank) for token in (model.run(one).argmax(-1) == one.prior).tolist()
    ]
    return [fact for fact, right in zip(every, tops, strict=True) if right]


def save(found: Found, model: str, folder: Path, card: dict[str, Any]) -> Path:
    """Writes the file that `--steer context-knob:path=FOLDER` reads, and a card of what was measured."""
    from redraft import LLM
    from redraft.models.trained import Trained, model_hash

    about = {"layer": found.layer, "context": found.context, "prior": found.prior}
    runner = LLM(model, max_model_len=64, max_seqs=1).runner
    path = Trained(METHOD, model_hash(runner), about, {"u": found.u.numpy().astype(np.float32)}).save(folder)
    lines = [f"# {METHOD} for {Path(model).name}", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in card.items())]
    (folder / "README.md").write_text("\n".join(lines) + "\n")
    return path


def load(folder: Path) -> Frozen:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return Frozen(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m redraft_train.knob", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a folder with a Llama-like model of transformers")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--layer", type=int, help="at whose output the knob acts; else found by a scan")
    parser.add_argument("--conflicts", type=int, default=300)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=900, help="of training, at most")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    model = load(Path(given.model))
    right = known(model)
    own, held = halves(conflicts(right, given.conflicts, given.seed), given.seed)
    if not own or not held:
        raise SystemExit(f"{given.model} knows {len(right)} of {len(facts())} facts: too few to train on")
    layer = given.layer
    if layer is None:
        changes = scan(model, own[: 3 * GROUP])
        layer = chosen(changes)
        print("answers changed by layer:", " ".join(f"{share:.2f}" for share in changes))
    found = train(model, own, layer, steps=given.steps, seed=given.seed, seconds=given.seconds)
    measured = shares(model, found, held)
    card = {
        "layer": layer, "constant of the context": round(found.context, 2), "constant of what it knows": round(found.prior, 2),
        "conflicts": f"{len(own)} trained, {len(held)} held out, without a fact in common", "steps": given.steps,
        **{f"held out: {name}": round(share, 3) for name, share in measured.items()},
    }  # fmt: skip
    print("\n".join(f"{name}: {value}" for name, value in card.items()))
    print(save(found, given.model, given.out, card))


if __name__ == "__main__":
    main()
