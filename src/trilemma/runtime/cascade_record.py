"""When a small model's answer is kept, and what that was calibrated on: the content of `cascade.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from trilemma.core.environment import Environment
from trilemma.core.errors import InputError, OutputError
from trilemma.core.files import write_whole
from trilemma.core.measurement import Measurement
from trilemma.core.recipe import explain
from trilemma.core.record import Record
from trilemma.core.results import DataFile
from trilemma.core.verdict import Verdict

Signal = Literal["mean", "p10"]
SIGNALS: tuple[Signal, ...] = ("mean", "p10")
SCHEMA_VERSION = 1


class CascadeRule(Record):
    """Keep the small model's answer when the signal, a probability, is at least `threshold`; 0 keeps all."""

    signal: Signal = "mean"
    threshold: float = Field(ge=0, le=1)


class CascadeRecord(Record):
    """A calibrated rule with the models it is for and the evidence: what `cascade.json` holds.

    `measurements`: 'cascade', 'small' and 'large' -> metric -> Measurement, all on the confirm part;
    shares are of its answers.
    """

    schema_version: int = SCHEMA_VERSION
    small: str
    large: str
    small_hash: str
    large_hash: str
    rule: CascadeRule
    prompt_tokens: int
    max_tokens: int
    verdicts: tuple[Verdict, ...]
    measurements: dict[str, dict[str, Measurement]]
    kept_share: float
    kept_token_share: float
    same_answer_share: float
    relative_answer_s: tuple[float, float | None, float | None]
    calibration_answers: int
    confirm_answers: int
    data_files: tuple[DataFile, ...]
    environment: Environment
    command: str = ""
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> CascadeRecord:
        """Raises InputError for a file that is missing, damaged or of another version."""
        try:
            found = cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"Can not read the cascade '{path}': {error.strerror}.") from None
        except (ValidationError, UnicodeDecodeError) as error:
            what = explain(error) if isinstance(error, ValidationError) else str(error)
            raise InputError(
                f"'{path}' is no record of a cascade ({what[:300]}). Make it with `trilemma run --cascade small,large "
                "--data FILE --limit ... -o cascade.json`."
            ) from None
        if found.schema_version != SCHEMA_VERSION:
            raise InputError(
                f"'{path}' has the version {found.schema_version}; this Trilemma reads {SCHEMA_VERSION}. "
                "Calibrate again."
            )
        return found

    def write(self, path: Path, *, force: bool = False) -> None:
        """Whole or not at all. Raises OutputError where a file is there already and `force` is not set."""
        if path.exists() and not force:
            raise OutputError(f"'{path}' exists already. Give another path, or --force to replace it.")
        write_whole(path, self.model_dump_json(indent=2) + "\n")
