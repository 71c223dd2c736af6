"""Drafters that read a file of `redraft train`: the option, and the errors about files that are missing or of another model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from redraft import registry
from redraft.errors import InvalidInput
from redraft.models.trained import Trained
from redraft.options import Options

if TYPE_CHECKING:
    from redraft.models.runner import Runner


@dataclass(frozen=True)
class TrainedFile(Options):
    """path: the folder of `redraft train`, or its file. holds: what is in it."""

    path: Path | None = None

    holds: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is None:
            raise InvalidInput(f"{self.name}:path=none: must be a folder with {self.holds}; {self._made}")

    @property
    def name(self) -> str:
        return registry.name_of(type(self))

    @property
    def _made(self) -> str:
        return f"make one with: redraft train MODEL --head {self.name} --prompts FILE --out FOLDER"

    def read(self) -> Trained:
        """InvalidInput if there is no such file, CheckpointError if it is damaged."""
        path = Path(self.path or "").expanduser()
        if not path.exists():
            raise InvalidInput(f"{self.name}:path={self.path}: no such file or folder; {self._made}")
        return Trained.load(path, self.name)

    def load(self, runner: Runner) -> Trained:
        """The same, and InvalidInput if it was made for another model."""
        trained = self.read()
        trained.check(runner, Path(self.path or ""))
        return trained
