"""The bodies and answers of the interfaces that score texts and rank documents."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from redraft.serve.documents import CachedTokens, EmbeddingUsage, Form
from redraft.serve.prompts import INPUTS
from redraft.serve.schema import MAX_NUMBER, Body, LongText, Replied

Texts = LongText | Annotated[list[LongText], Field(min_length=1, max_length=INPUTS)]


class Judged(Body):
    """Fields that both have in common."""

    lacking = {  # noqa: RUF012  # as pydantic reads it
        "truncate_prompt_tokens": "truncation", "truncation": "truncation", "max_tokens_per_doc": "truncation",
        "max_chunks_per_doc": "documents in chunks", "rank_fields": "fields of documents", "activation": "other scores",
        "use_activation": "other scores", "softmax": "other scores", "instruction": "instructions", "mm_processor_kwargs": "images",
    }  # fmt: skip
    model: str | None = Field(None, max_length=400)
    user: str | None = Field(None, max_length=1000, description="accepted, and without effect")
    priority: int | None = Field(None, ge=-MAX_NUMBER, lt=MAX_NUMBER, description="lower numbers run first")
    cache_salt: str | None = Field(None, max_length=1000, description="requests share cached prefixes only with the same salt")


class ScoreRequest(Judged):
    """`text_1` and `text_2`, or by their other names `queries` and `documents`."""

    text_1: Texts | None = Field(None, description="what precedes: one text for all of text_2, or one for each")
    text_2: Texts | None = Field(None, description="what is scored")
    queries: Texts | None = Field(None, description="another name of text_1")
    documents: Texts | None = Field(None, description="another name of text_2")

    @model_validator(mode="after")
    def _paired(self) -> Self:
        given = [name for name in ("text_1", "text_2", "queries", "documents") if getattr(self, name) is not None]
        if given not in (["text_1", "text_2"], ["queries", "documents"]):
            raise ValueError("text_1: either text_1 and text_2 are needed, or queries and documents")
        if len(self.before) not in (1, len(self.scored)):
            raise ValueError(f"{given[0]}: it has {len(self.before)} texts and {given[1]} {len(self.scored)}: 1 or as many are needed")
        return self

    @property
    def before(self) -> list[str]:
        return _listed(self.text_1 if self.queries is None else self.queries)

    @property
    def scored(self) -> list[str]:
        return _listed(self.text_2 if self.documents is None else self.documents)


def _listed(texts: Texts | None) -> list[str]:
    return [texts] if isinstance(texts, str) else texts or []


class RankedDocument(Replied):
    text: LongText


class RerankRequest(Judged):
    query: Annotated[LongText, Field(min_length=1)]
    documents: list[LongText | RankedDocument] = Field(min_length=1, max_length=INPUTS)
    top_n: int | None = Field(None, ge=1, lt=MAX_NUMBER, description="the best of them; without it, all")
    return_documents: bool | None = Field(None, description="true if it is not given: results have their texts")


# ---- answers


class JudgedUsage(EmbeddingUsage):
    prompt_tokens_details: CachedTokens


class Score(Form):
    index: int
    object: Literal["score"]
    score: float = Field(le=0, description="mean log-probability of the tokens of text_2")


class Scores(Form):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: JudgedUsage


class DocumentText(Form):
    text: str


class Ranked(Form):
    index: int = Field(description="of the document in the request")
    relevance_score: float = Field(ge=0, le=1)
    document: DocumentText | None = None


class Ranking(Form):
    id: str
    model: str
    results: list[Ranked] = Field(description="the most relevant first")
    usage: JudgedUsage
