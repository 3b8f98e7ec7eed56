"""What a walk over the layers leaves on disk: hidden states, finished layers, and where to go on after a kill.

    layers-<key>/
      layer-3.safetensors   the tensors that were put into layer 3
      layer-3.json          their records and those of the states behind the layer; once it is there, the layer is done
      <role>-<place>.f32    hidden states (see states.py)

The key names everything that decides the result (`apply_recipe` makes it), so what another model, recipe, text or
release left is never found. Finished tensors are read from here when asked for. A walk without a key, or without a
work folder, keeps its states in a temporary folder and nothing else.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType

from pydantic import ValidationError
from torch import Tensor

from trilemma.core.errors import CheckpointError, OutputError
from trilemma.core.files import write_whole
from trilemma.core.record import Record
from trilemma.formats.artifact import TensorFile, TensorRecord, write_tensors
from trilemma.model.model import Float32, Model, StoredMatrix
from trilemma.techniques.states import Shape, States
from trilemma.techniques.technique import Build
from trilemma.techniques.threads import by_batches

Tensors = Mapping[str, Float32 | StoredMatrix]


class KeptStates(Record):
    """One file of hidden states; crc32 as zlib's."""

    file: str
    crc32: int


class KeptPart(Record):
    """A finished part of the work: its tensors and their file's SHA-256, and by role the hidden states behind it."""

    tensors: dict[str, TensorRecord]
    sha256: str
    states: dict[str, KeptStates] = {}


class WalkFolder:
    """The folder of one walk, a context manager.

    Args:
        build: `work` and `key` say whether and where finished layers are kept.
        shape: (windows, context, dim) of the hidden states.
        kept: whether a layer's new tensors depend on nothing but the model, its statistics and the settings.

    finished: layers that an earlier run has done.
    """

    def __init__(self, build: Build, shape: Shape, *, kept: bool) -> None:
        self._build, self._shape = build, shape
        self._folder = kept_folder(build, "layers") if kept else None
        self._temporary = None if self._folder else tempfile.TemporaryDirectory(prefix="trilemma-states-")
        self._place = self._folder or Path(str(self._temporary and self._temporary.name))
        self._last: KeptPart | None = None
        self.finished = 0

    def __enter__(self) -> WalkFolder:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()

    def resumed(self, model: Model) -> Model:
        """The model with the layers that an earlier run has finished."""
        while self._folder is not None and (found := _read(self._folder, f"layer-{self.finished}")) is not None:
            model, self._last = _patched(model, self._folder, f"layer-{self.finished}", found), found
            self.finished += 1
        return model

    def states(self, role: str, embedded: Callable[[], Callable[[slice], Tensor]]) -> States:
        """Hidden states before the first layer that is not finished; `embedded()` gives what makes those of layer 0."""
        if self._last is None:
            made, enter = self.fresh(role, "start"), embedded()

            def fill(batch: slice) -> tuple[()]:
                made[batch] = enter(batch)
                return ()

            by_batches(fill, *self._shape[:2], self._build.threads)
            return made
        if role not in self._last.states:  # everything is done, so nobody will read them
            return States(self._place / role, self._shape)
        kept = self._last.states[role]
        found = States(self._place / kept.file, self._shape, self._build.device)
        if not found.path.is_file() or found.checksum() != kept.crc32:
            raise CheckpointError(
                f"'{found.path}' is missing, cut short or damaged. Delete '{self._place}' to begin again."
            )
        return found

    def fresh(self, role: str, place: str) -> States:
        """An empty file for hidden states at a place: 'start', '3-attention', ..."""
        return States(self._place / f"{role}-{place}.f32", self._shape, self._build.device).create()

    def finish(self, index: int, before: Model, model: Model, states: Mapping[str, States]) -> Model:
        """Layer `index` is done: keep what differs from `before`, and no other states than those behind it."""
        if self._folder is not None:
            changed = [name for name, tensor in model.replaced.items() if tensor is not before.replaced.get(name)]
            kept = {}
            for role, each in states.items():
                each.settle()
                kept[role] = KeptStates(file=each.path.name, crc32=each.checksum())
            model = _keep(self._folder, f"layer-{index}", model, changed, kept)
        wanted = {each.path for each in states.values()}
        for path in self._place.glob("*.f32"):
            if path not in wanted:
                path.unlink()
        return model


def made_once(model: Model, build: Build, what: str, make: Callable[[], Tensors]) -> Model:
    """`model` with the tensors that `make` gives; with a work folder they lie there, and are made once."""
    folder = kept_folder(build, "layers")
    if folder is None:
        return model.with_tensors(make())
    found = _read(folder, what)
    if found is not None:
        return _patched(model, folder, what, found)
    tensors = make()
    return _keep(folder, what, model.with_tensors(tensors), tensors, {})


def kept_folder(build: Build, kind: str) -> Path | None:
    """Where this step may keep what it has done; None without a work folder or a key."""
    if build.work is None or not build.key:
        return None
    folder = build.work / f"{kind}-{build.key}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Can not make '{folder}': {error.strerror or error}. Choose another output.") from None
    return folder


def _keep(folder: Path, name: str, model: Model, names: Collection[str], states: Mapping[str, KeptStates]) -> Model:
    """Write tensors of the model, then their record; returns the model that reads them from there."""
    path = folder / f"{name}.safetensors"
    beside = path.with_suffix(".partial")
    try:
        records, digest = write_tensors(model, names, beside)
        beside.replace(path)
    except OSError as error:
        raise OutputError(f"Can not write '{path}': {error.strerror or error}. Free space there.") from None
    part = KeptPart(tensors=records, sha256=digest, states=dict(states))
    write_whole(folder / f"{name}.json", part.model_dump_json() + "\n")
    return _patched(model, folder, name, part)


def _read(folder: Path, name: str) -> KeptPart | None:
    """What an earlier run has kept under this name, checked; None where it has not come so far."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    tensors = folder / f"{name}.safetensors"
    try:
        part = KeptPart.model_validate_json(path.read_bytes())
        with tensors.open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == part.sha256
    except (OSError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"'{path}' is damaged ({reason}). Delete '{folder}' to begin again.") from None
    if not whole:
        raise CheckpointError(f"'{tensors}' was cut short or changed. Delete '{folder}' to begin again.")
    return part


def _patched(model: Model, folder: Path, name: str, part: KeptPart) -> Model:
    return model.with_source(TensorFile(folder / f"{name}.safetensors", part.tensors), part.tensors)
