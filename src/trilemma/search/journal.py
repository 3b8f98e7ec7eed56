"""Trials that survive a kill: one JSON line each, beside what they built, in a folder next to the output.

A trial is found again only when everything that its numbers depend on is the same: model, recipe,
texts and how much of them, lengths, engine, threads and processor. What was built does not depend on the
amount of text, so it is found again by a search with more time too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from trilemma.core.errors import OutputError
from trilemma.core.recipe import Recipe
from trilemma.core.record import Record
from trilemma.core.trial import Trial
from trilemma.search.plan import TextPlan


class JournalLine(Record):
    """One finished trial and the key of the circumstances it was measured in."""

    key: str
    trial: Trial


class PlanFile(Record):
    """The amounts of text that an interrupted search had settled on, and the key of what they were planned for."""

    key: str
    plan: TextPlan


class Journal:
    """Opens (or makes) the work folder `<output>.search`.

    Args:
        folder: the work folder.
        circumstances: what the numbers of a trial depend on, apart from recipe and amount of text.
        limit_s: seconds of the search; the same time takes up the same plan.
        make_plan: amounts of text, where no interrupted search has settled on them.

    Raises:
        OutputError: the folder can not be made or written.
    """

    def __init__(
        self, folder: Path, circumstances: dict[str, object], limit_s: float, make_plan: Callable[[], TextPlan]
    ) -> None:
        self.folder = folder
        self._file = folder / "trials.jsonl"
        self._circumstances = json.dumps(circumstances, sort_keys=True, default=str)
        self._guarded(lambda: folder.mkdir(parents=True, exist_ok=True))
        self.text_plan = self._settled_plan(limit_s) or self._settle(limit_s, make_plan())
        self._known = self._read()

    def key(self, recipe: Recipe) -> str:
        return self._hash(recipe.hash, str(self.text_plan.select_tokens))

    def find(self, recipe: Recipe) -> Trial | None:
        return self._known.get(self.key(recipe))

    def keep(self, trial: Trial) -> None:
        """Append at once, so that a kill loses at most the trial under way."""
        line = JournalLine(key=self.key(trial.recipe), trial=trial)

        def append() -> None:
            with self._file.open("ab+") as lines:
                if lines.tell() and not self._ends_with_a_line():
                    lines.write(b"\n")  # a kill cut the last line: it stays alone in its loss
                lines.write(line.model_dump_json().encode() + b"\n")

        self._guarded(append)
        self._known[line.key] = trial

    def artifact_folder(self, recipe: Recipe) -> Path:
        """Where the artifact of a recipe is built."""
        return self.folder / "built" / self._hash(recipe.hash)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> dict[str, Trial]:
        if not self._file.is_file():
            return {}
        found: dict[str, Trial] = {}
        for text in self._file.read_bytes().split(b"\n"):
            try:
                line = JournalLine.model_validate_json(text)
            except ValidationError:
                continue  # a line cut by a kill, or of another release: that trial is measured again
            found[line.key] = line.trial
        return found

    def _ends_with_a_line(self) -> bool:
        with self._file.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def _hash(self, *parts: str) -> str:
        return hashlib.sha256("|".join((self._circumstances, *parts)).encode()).hexdigest()[:16]

    def _settled_plan(self, limit_s: float) -> TextPlan | None:
        try:
            found = PlanFile.model_validate_json((self.folder / "plan.json").read_bytes())
        except (OSError, ValidationError):
            return None
        return found.plan if found.key == self._hash(f"{limit_s:g}") else None

    def _settle(self, limit_s: float, plan: TextPlan) -> TextPlan:
        text = PlanFile(key=self._hash(f"{limit_s:g}"), plan=plan).model_dump_json()
        self._guarded(lambda: (self.folder / "plan.json").write_text(text + "\n", encoding="utf-8"))
        return plan

    def _guarded(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            raise OutputError(
                f"Can not write '{self.folder}': {error.strerror or error}. Free space or choose another output."
            ) from None
