"""Checks requests and makes their sequences."""

from __future__ import annotations

import secrets
from collections.abc import Sequence as Seq
from hashlib import sha256
from itertools import zip_longest
from typing import cast

from redraft import registry
from redraft.core.noise import sample_seed
from redraft.core.sequence import UNLIMITED, Request, Sequence
from redraft.core.tree import F32
from redraft.engine.output import Progress
from redraft.engine.policies import Policies
from redraft.engine.speculation import Drafters
from redraft.errors import InvalidInput, OutOfMemory, PromptTooLong, Unsupported
from redraft.kv.reuse.reuse import OpenReuse
from redraft.models.adapter import Adapter, unknown
from redraft.models.runner import Runner
from redraft.sample.sampler import Sampler


def salted(vectors: F32, salt: str) -> str:
    """The salt of a prompt of vectors in the prefix cache, where their tokens only stand in for them."""
    return f"{sha256(vectors.tobytes()).hexdigest()}\0{salt}"


class Admission:
    """max_model_len: tokens of prompt and output; spells: whether a tokenizer turns tokens into text."""

    def __init__(
        self, runner: Runner, sampler: Sampler, drafter: Drafters, policies: Policies, *, max_model_len: int, spells: bool
    ) -> None:
        memory = runner.memory
        if memory.blocks * memory.paged.table.page < max_model_len:
            raise OutOfMemory(f"a pool of {memory.blocks} blocks cannot hold one sequence of max_model_len = {max_model_len} tokens")
        self.runner, self.memory, self.vocab = runner, memory, runner.spec.vocab
        self.sampler, self.drafter, self.policies = sampler, drafter, policies
        self.max_model_len, self.spells = max_model_len, spells
        self._ids = 0

    def admit(self, request: Request, progress: Seq[Progress] = ()) -> list[Sequence]:
        """The request's first sequence, or all of them if `progress` says what each has already. Chooses a seed if the request has none.
        On InvalidInput (PromptTooLong) nothing has changed."""
        self._check(request)
        self._check_progress(request, progress)
        params, salt, adapter = request.params, request.salt, request.adapter
        chosen = self._adapter(request)
        if params.seed is None:
            request.params = params.but(seed=secrets.randbits(63))
        if request.vectors is not None:
            request.salt = salted(request.vectors, request.salt)
        if chosen is not None:
            request.adapter, request.salt = chosen, chosen.salted(request.salt)
        try:
            seqs = [self.sequence(request, index) for index in range(len(progress) or 1)]
            self._check_length(seqs[0])
        except Exception:
            request.params, request.salt, request.adapter = params, salt, adapter
            request.sequences.clear()
            raise
        for seq, before in zip(seqs, progress, strict=False):
            seq.tokens += before.tokens
            seq.sync_point = self.sync_point(seq)
        return [seq for seq, before in zip_longest(seqs, progress) if before is None or not before.ended]

    def sequence(self, request: Request, index: int) -> Sequence:
        """A new sequence of an admitted request."""
        assert request.params.seed is not None
        self._ids += 1
        seq = Sequence(self._ids, request, index, list(request.prompt), len(request.prompt), sample_seed(request.params.seed, index), 0)
        self.policies.fit(seq)
        self.drafter.fit(seq)
        request.sequences.append(seq)
        seq.sync_point = self.sync_point(seq)
        return seq

    def limit(self, seq: Sequence) -> int:
        """Tokens of prompt and output, at most. With an endless context, only max_tokens limits the text."""
        return UNLIMITED if seq.cache.endless and seq.params.max_tokens is not None else self.max_model_len

    def sync_point(self, seq: Sequence) -> int:
        """The next value of `stored` that no step may cross."""
        request = seq.request
        found = self.limit(seq) - 1
        if request.params.max_tokens is not None:
            found = min(found, seq.prompt_len + request.params.max_tokens - 1)
        if seq.index == 0 and len(request.sequences) < request.params.n and seq.stored < seq.prompt_len:
            found = seq.prompt_len - 1
        return min(found, self.policies.sync_point(seq))

    # ---- checks

    def _adapter(self, request: Request) -> Adapter | None:
        """The adapter of the request, which may bring one that is no longer loaded. InvalidInput if there is none of the chosen name."""
        name, found = request.params.lora, cast("Adapter | None", request.adapter)
        if name is not None and found is None:
            found = self.runner.adapters.get(name)  # in one step, because other threads load and unload
            if found is None:
                raise InvalidInput(unknown(name, self.runner.adapters))
        return found

    def _check(self, request: Request) -> None:
        params, prompt = request.params, request.prompt
        if not prompt:
            raise InvalidInput("prompt is empty: at least one token is needed")
        self._check_ids("prompt_token_ids", prompt)
        plan = self.policies.check(params, request.reuse)
        if plan.reuse is not None:
            self._check_reuse(request, plan.reuse)
        self.drafter.check(params)
        if request.vectors is not None:
            self._check_vectors(request)
        if len(prompt) >= self.max_model_len and not (plan.endless and params.max_tokens is not None):
            raise PromptTooLong(f"prompt has {len(prompt)} tokens: max_model_len = {self.max_model_len} leaves no room for a new one")
        self._check_ids("before", request.before)
        self._check_chunks(request)
        if request.context is not None and not 1 <= request.context <= len(prompt):
            raise InvalidInput(f"context = {request.context}: 1 to {len(prompt)}, the tokens of the prompt, is allowed")
        self._check_ids("stop_token_ids", params.stop_token_ids)
        if isinstance(params.prediction, str):
            raise InvalidInput("prediction is a text, and this engine has no tokenizer; give token ids")
        self._check_ids("prediction", params.prediction or ())
        if params.stop and not self.spells:
            raise InvalidInput("stop needs a tokenizer, and this engine has none; use stop_token_ids")
        self.sampler.check(params)

    def _check_reuse(self, request: Request, reuse: OpenReuse) -> None:
        reused = request.chunks[-1][1] + reuse.after if request.chunks else len(request.prompt)
        if request.wants.skippable < min(reused, len(request.prompt)):
            name = "prompt_logprobs" if request.wants.prompt_logprobs is not None else "mean embeddings"
            raise Unsupported(f"reuse {request.reuse}: {name} need the whole prompt computed, but reuse skips parts of it")
        if reuse.later and request.params.n > 1:
            shared = "texts of one request share pages, in which no rows can run again after the first new token"
            raise Unsupported(
                f"reuse {request.reuse}: n = {request.params.n}, but {shared}; n = 1, or an option that stops these, is needed"
            )

    def _check_chunks(self, request: Request) -> None:
        if request.chunks and request.reuse and registry.create("reuse", request.reuse).needs == "before":
            raise InvalidInput(f"reuse = {request.reuse}: it reuses the text before an edit, but the prompt has segments")
        at, last = 1, len(request.prompt) - 1
        for first, end in request.chunks:
            if not at <= first < end <= last:
                allowed = "parts of the prompt in order, each with a token, after its first token and before its last"
                raise InvalidInput(f"chunks: ({first}, {end}) of a prompt of {last + 1} tokens: {allowed}, are allowed")
            at = end

    def _check_vectors(self, request: Request) -> None:
        vectors, hidden = request.vectors, self.runner.spec.hidden
        assert vectors is not None
        if vectors.shape != (len(request.prompt), hidden):
            count = len(request.prompt)
            raise InvalidInput(f"prompt_embeds of shape {list(vectors.shape)}: [{count}, {hidden}], tokens and hidden size, is needed")
        if request.wants.prompt_logprobs is not None:
            raise Unsupported("prompt_embeds: vectors have no log-probabilities, so prompt_logprobs is not possible")
        if request.reuse:
            raise Unsupported(f"prompt_embeds: reuse {request.reuse} compares tokens, and vectors are none")

    def _check_progress(self, request: Request, progress: Seq[Progress]) -> None:
        params = request.params
        if progress and len(progress) != params.n:
            raise InvalidInput(f"progress of {len(progress)} texts: the request has n = {params.n}")
        if progress and (params.seed is None or not request.wants.new_tokens):
            raise InvalidInput("progress: only a request with a seed, which generates text, can go on from what it has")
        for i, before in enumerate(progress):
            self._check_ids(f"progress[{i}]", before.tokens)

    def _check_ids(self, name: str, tokens: Seq[int]) -> None:
        for i, token in enumerate(tokens):
            if type(token) is not int or not 0 <= token < self.vocab:
                raise InvalidInput(f"{name}[{i}] = {token!r}: not a token id in 0..{self.vocab - 1}")

    def _check_length(self, seq: Sequence) -> None:
        """InvalidInput if the pool cannot hold the whole text."""
        total = min(self.limit(seq), seq.prompt_len + (seq.params.max_tokens or self.max_model_len))
        if (need := self.memory.need(seq, total)) > self.memory.blocks:
            raise InvalidInput(
                f"{total} tokens need {need} blocks in the chosen cache format, but the pool has {self.memory.blocks}: use fewer"
                " max_tokens, or give the pool more memory"
            )
