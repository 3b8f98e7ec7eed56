"""Trials that survive a kill: one JSON line each, beside what they built, in a folder next to the output.

A trial is found again only when everything that its numbers depend on is the same: model, recipe,
texts, lengths, engine, threads and processor.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from pydantic import ValidationError

from trilemma.core.errors import OutputError
from trilemma.core.recipe import Recipe
from trilemma.core.record import Record
from trilemma.core.trial import Trial


class JournalLine(Record):
    """One finished trial and the key of the circumstances it was measured in."""

    key: str
    trial: Trial


class Journal:
    """Opens (or makes) the work folder `<output>.search`.

    Raises:
        OutputError: the folder can not be made or written.
    """

    def __init__(self, folder: Path, circumstances: dict[str, object]) -> None:
        self.folder = folder
        self._file = folder / "trials.jsonl"
        self._circumstances = json.dumps(circumstances, sort_keys=True, default=str)
        self._guarded(lambda: folder.mkdir(parents=True, exist_ok=True))
        self._known = self._read()

    def key(self, recipe: Recipe) -> str:
        return hashlib.sha256(f"{self._circumstances}|{recipe.hash}".encode()).hexdigest()[:16]

    def find(self, recipe: Recipe) -> Trial | None:
        return self._known.get(self.key(recipe))

    def keep(self, trial: Trial) -> None:
        """Append at once, so that a kill loses at most the trial under way."""
        line = JournalLine(key=self.key(trial.recipe), trial=trial)

        def append() -> None:
            with self._file.open("a", encoding="utf-8") as lines:
                lines.write(line.model_dump_json() + "\n")

        self._guarded(append)
        self._known[line.key] = trial

    def artifact_folder(self, recipe: Recipe) -> Path:
        """Where the artifact of a recipe is built."""
        return self.folder / "built" / self.key(recipe)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> dict[str, Trial]:
        if not self._file.is_file():
            return {}
        found: dict[str, Trial] = {}
        for text in self._file.read_text(encoding="utf-8").splitlines():
            try:
                line = JournalLine.model_validate_json(text)
            except ValidationError:
                continue  # a line cut by a kill, or of another release: that trial is measured again
            found[line.key] = line.trial
        return found

    def _guarded(self, action: object) -> None:
        assert callable(action)
        try:
            action()
        except OSError as error:
            raise OutputError(
                f"Can not write '{self.folder}': {error.strerror or error}. Free space or choose another output."
            ) from None
