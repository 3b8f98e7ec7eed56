"""The exceptions that Trilemma raises on purpose.

TrilemmaError
├── InputError                 what the user gave can not be used           (exit code 2)
│   ├── CheckpointError        files of a model: missing, truncated, wrong shape, NaN, pickle
│   ├── UnsupportedModelError  an architecture or an option of it that we do not run
│   ├── RecipeError            recipe, scheme or technique settings
│   ├── LimitError             a limit that can not be parsed or checked
│   ├── DataError              texts: empty, unreadable, overlapping
│   ├── UnknownNameError       a name that no table lists
│   └── OutputError            the output folder can not be written
├── MissingExtraError          a package of an extra is not installed       (exit code 2)
├── TrainingError              training diverged or could not begin         (exit code 2)
├── EngineError                the engine refused or failed                 (exit code 2)
└── StoppedError               the user stopped it; the message says how to go on (exit code 130)

Every message names the bad value, what was expected and the fix.
Exit codes of the commands: 0 all PASS, 2 bad input, 3 a limit FAILs or none is feasible, 4 INCONCLUSIVE.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrilemmaError(Exception):
    """Root of every error raised on purpose."""

    exit_code = 2


class InputError(TrilemmaError):
    """What the user gave can not be used."""


class CheckpointError(InputError):
    """A model's files are missing, damaged or of the wrong shape."""


class UnsupportedModelError(InputError):
    """The architecture, or an option of it, is not implemented."""


class RecipeError(InputError):
    """A recipe, a scheme or the settings of a technique are wrong."""


class LimitError(InputError):
    """A limit can not be parsed, or names something that can not be checked."""


class DataError(InputError):
    """Texts are missing, empty, unreadable or overlap."""


class OutputError(InputError):
    """The output can not be written."""


class UnknownNameError(InputError):
    """A name that no table lists; the message gives the closest and the valid ones."""

    def __init__(self, kind: str, name: str, valid: Iterable[str]) -> None:
        names = sorted(valid)
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        super().__init__(f"Unknown {kind} '{name}'.{hint} Valid: {', '.join(names) or 'none'}.")
        self.kind = kind
        self.name = name


class MissingExtraError(TrilemmaError):
    """A package that belongs to an optional extra is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}'. Install it with: pip install 'trilemma[{extra}]'")


class TrainingError(TrilemmaError):
    """Training diverged or could not begin."""


class EngineError(TrilemmaError):
    """An engine refused a model or a request."""


class StoppedError(TrilemmaError):
    """The user stopped a long piece of work; what was finished is kept."""

    exit_code = 130
