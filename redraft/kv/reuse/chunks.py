"""The cache of a chunk: the published blocks of the text that is the head of a prompt followed by the chunk.

A prompt of segments is a head, chunks in any order, and a last part. The head, which is also the start of the cached text of each
chunk, keeps the first tokens of chunks from drawing all attention: Xiao et al., Efficient Streaming Language Models with Attention
Sinks, 2023, arXiv 2309.17453.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from redraft.core.sequence import Request
from redraft.kv.reuse.reuse import Span
from redraft.ops.format import PAGE

FILLER = 0  # a token after the chunk, so that all its tokens are in full blocks; no token before it depends on it


def text_of(head: Seq[int], chunk: Seq[int]) -> list[int]:
    """The text whose blocks are the cache of a chunk."""
    length = len(head) + len(chunk)
    return [*head, *chunk, *[FILLER] * (-length % PAGE)]


def texts_of(request: Request) -> list[list[int]]:
    """The same of each chunk of a prompt."""
    prompt = request.prompt
    return [text_of(prompt[: request.chunks[0][0]], prompt[first:end]) for first, end in request.chunks]


def spans_of(request: Request) -> list[Span]:
    """A span for each chunk of a prompt. That of a chunk right after the head is exact."""
    found = []
    for (first, end), text in zip(request.chunks, texts_of(request), strict=True):
        head = request.chunks[0][0]
        found.append(Span(first, head, end - first, first == head, text))
    return found
