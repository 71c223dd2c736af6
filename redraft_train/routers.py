"""Trains the routers of `--depth first`: which layers a model can do without behind a prompt, by the states of the prompt.

    python -m redraft_train.routers MODEL --data FOLDER

The model is frozen. FOLDER is the data folder of a `redraft train`, with texts that the model wrote. Behind the prompt the output of
each layer but the first and the last counts times a gate, 1 if the layer's mean vote is 0.5 or more and else 0, whose gradient is that
of the mean. The loss is the cross-entropy of the answers and the squared distance of the gates' mean from the wanted share.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

METHOD = "first"
WEIGHT = 20.0  # of the squared distance from the wanted share
OPEN = 1.0  # the votes of untrained routers, before the sigmoid
SAMPLED = 8  # texts from which the scale of states is measured


class Example(NamedTuple):
    """tokens: i64[T]; context: the number of leading tokens that are the prompt."""

    tokens: Tensor
    context: int


@dataclass(frozen=True)
class Plan:
    """keep: the wanted share of layers between the first and the last; steps: of the optimizer, each over `batch` texts; rate: the peak
    learning rate; seconds: the most time."""

    keep: float = 0.75
    steps: int = 300
    batch: int = 4
    rate: float = 0.03
    seconds: float = float("inf")
    seed: int = 0


class Routed(nn.Module):
    """A frozen model of transformers with a router at each layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = [model.eval().requires_grad_(False)]  # not a part of this module
        self.blocks = model.model.layers
        count, hidden = len(self.blocks), model.config.hidden_size
        self.weight, self.bias = nn.Parameter(torch.zeros(count, hidden)), nn.Parameter(torch.full((count,), OPEN))
        self.mean, self.scale = torch.zeros(count, hidden), torch.ones(count, hidden)

    def forward(self, example: Example, gates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(the cross-entropy of the tokens behind the context, the gates [L]). gates: instead of those that the routers choose."""
        count, used = len(self.blocks), {}

        def hook(layer: int) -> Any:
            def act(module: Any, given: Any, named: Any, out: Any) -> Any:
                x = given[0] if given else named["hidden_states"]
                y = out[0] if isinstance(out, tuple) else out
                gate = self._gate(layer, x[0, : example.context]) if gates is None else gates[layer]
                used[layer] = gate
                rows = x[:, example.context :] + gate * (y[:, example.context :] - x[:, example.context :])
                made = torch.cat([y[:, : example.context], rows.to(y.dtype)], 1)
                return (made, *out[1:]) if isinstance(out, tuple) else made

            return act

        holds = [self.blocks[i].register_forward_hook(hook(i), with_kwargs=True) for i in range(1, count - 1)]
        try:
            logits = self.model[0](example.tokens[None], use_cache=False).logits[0, example.context - 1 : -1]
        finally:
            for hold in holds:
                hold.remove()
        one = torch.ones(())
        return F.cross_entropy(logits.float(), example.tokens[example.context :]), torch.stack([used.get(i, one) for i in range(count)])

    def _gate(self, layer: int, states: Tensor) -> Tensor:
        scaled = (states.float() - self.mean[layer]) / self.scale[layer]
        mean = (scaled @ self.weight[layer] + self.bias[layer]).sigmoid().mean()
        return (mean >= 0.5).float() + mean - mean.detach()

    @torch.no_grad()
    def measure(self, examples: Seq[Example]) -> None:
        """Sets the mean and the deviation of each channel of each layer's input."""
        kept: list[list[Tensor]] = [[] for _ in self.blocks]

        def keep(own: list[Tensor]) -> Any:
            return lambda module, given, named: own.append((given[0] if given else named["hidden_states"])[0].float())

        holds = [block.register_forward_pre_hook(keep(own), with_kwargs=True) for block, own in zip(self.blocks, kept, strict=True)]
        for example in examples:
            self.model[0](example.tokens[None, : example.context], use_cache=False)
        for hold in holds:
            hold.remove()
        rows = [torch.cat(one) for one in kept]
        self.mean = torch.stack([one.mean(0) for one in rows])
        self.scale = torch.stack([one.std(0) for one in rows]).clamp_min(1e-3) * self.mean.shape[1] ** 0.5

    def arrays(self) -> dict[str, Any]:
        """What --depth first reads: votes are sigmoid(weight h + bias)."""
        weight = (self.weight / self.scale).detach()
        bias = self.bias.detach() - (weight * self.mean).sum(1)
        return {"weight": weight.numpy().astype(np.float32), "bias": bias.numpy().astype(np.float32)}


def train(model: Any, examples: Seq[Example], plan: Plan, show: Any = lambda line: None) -> Routed:
    """model: of transformers, a decoder with `model.layers`; examples: of a context and an answer each."""
    routed, began = Routed(model), time.monotonic()
    routed.measure(examples[:SAMPLED])
    optimizer = torch.optim.Adam(routed.parameters(), lr=plan.rate)
    order = np.random.default_rng(plan.seed)
    for step in range(plan.steps):
        share = max(step / plan.steps, (time.monotonic() - began) / plan.seconds)
        if share >= 1:
            break
        losses, kept = [], []
        for i in order.integers(len(examples), size=plan.batch):
            loss, gates = routed(examples[i])
            share_kept = gates[1:-1].mean()
            ((loss + WEIGHT * (share_kept - plan.keep) ** 2) / plan.batch).backward()
            losses.append(loss.item())
            kept.append(share_kept.item())
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * (1 - share)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            show(f"step {step:4d}  loss {np.mean(losses):.3f}  layers kept {np.mean(kept):.2f}")
    return routed


def examples(folder: Path, longest: int = 512) -> list[Example]:
    """Of the texts that `redraft train` wrote into its data folder: the first answer of each. InvalidInput if there are none."""
    from redraft.errors import InvalidInput

    try:
        lines = (folder / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidInput(f"--data = {folder}: no texts.jsonl ({error.strerror}); redraft train makes one") from None
    found = []
    for text in map(json.loads, lines):
        first, last = text["answers"][0]
        if not text["held"] and last - first > 1 and last <= longest:
            found.append(Example(torch.tensor(text["tokens"][:last]), first))
    if not found:
        raise InvalidInput(f"--data = {folder}: no answers of 2 tokens or more in texts of at most {longest}")
    return found


def main() -> None:
    from transformers import AutoModelForCausalLM

    from redraft import LLM
    from redraft.errors import RedraftError
    from redraft.models.trained import Trained, model_hash, place

    parser = argparse.ArgumentParser(prog="python -m redraft_train.routers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--keep", type=float, default=Plan.keep, help="wanted share of layers, default %(default)s")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: where --depth first looks")
    given = parser.parse_args()
    if not 0 < given.keep < 1:
        parser.error(f"--keep {given.keep}: must be above 0 and below 1")
    try:
        llm, texts = LLM(given.model), examples(given.data)
        plan = Plan(given.keep, given.steps, seed=given.seed)
        routed = train(AutoModelForCausalLM.from_pretrained(llm.source), texts, plan, partial(print, flush=True))
        model = model_hash(llm.runner)
        about = {"keep": given.keep, "steps": given.steps, "texts": len(texts)}
        path = Trained(METHOD, model, about, routed.arrays()).save(given.out or place(METHOD, model))
    except RedraftError as error:
        parser.error(str(error))
    print(f"wrote {path}; use it with --depth first" + (f":path={given.out}" if given.out else ""))


if __name__ == "__main__":
    main()
