"""Options of sampling by the names that llama.cpp and Ollama give them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from redraft.serve.schema import MAX_NUMBER, Tuned

Number = Annotated[float, Field(gt=-MAX_NUMBER, lt=MAX_NUMBER)] | None


PENALTIES: dict[str, Any] = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
SAMPLERS: dict[str, dict[str, Any]] = {  # name -> its fields, with values without effect
    "penalties": PENALTIES, "dry": {"dry_multiplier": 0.0}, "top_n_sigma": {"top_n_sigma": 0.0}, "top_k": {"top_k": 0},
    "typ_p": {"typical_p": 1.0}, "top_p": {"top_p": 1.0}, "min_p": {"min_p": 0.0}, "xtc": {"xtc_probability": 0.0},
    "temperature": {"temperature": 1.0, "dynatemp_range": 0.0}, "infill": {},
}  # fmt: skip


def neutral(samplers: Iterable[str]) -> dict[str, Any]:
    """The fields of these samplers, with values without effect."""
    return {name: value for sampler in samplers for name, value in SAMPLERS[sampler].items()}


class LlamaOptions(Tuned):
    """Samplers that Redraft lacks are refused by name, unless they are off. With mirostat, temperature alone acts beside it, as there."""

    lacking: ClassVar[dict[str, str]] = {"tfs_z": "tail-free sampling"}
    neutral: ClassVar[dict[str, Any]] = {"tfs_z": 1}

    repeat_penalty: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False, description="of all tokens of prompt and text")
    repeat_last_n: int | None = Field(
        None, ge=-1, lt=MAX_NUMBER, description="-1: penalties see the whole text; 0: there are none; other numbers only without any"
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        penalties = (self.repeat_penalty, 1), (self.presence_penalty, 0), (self.frequency_penalty, 0)
        if self.repeat_last_n not in (None, -1, 0) and any(value not in (None, off) for value, off in penalties):
            raise ValueError(f"repeat_last_n = {self.repeat_last_n}: penalties see the whole text here; give -1, or 0 for none")
        return self

    def tuned(self) -> dict[str, Any]:
        """The same as fields of a completion or a chat."""
        found = {name: getattr(self, name) for name in Tuned.model_fields} | {"repetition_penalty": self.repeat_penalty}
        if self.seed == -1:
            found["seed"] = None
        if self.repeat_last_n == 0:
            found |= PENALTIES
        if self.mirostat:
            found |= {**neutral(set(SAMPLERS) - {"temperature"}), "dynatemp_range": 0.0}
        return found
