"""llama.cpp's own quantization with an importance matrix, and which of our formats holds what its types hold."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from quality.yard import Yard
from trilemma.core.errors import InputError
from trilemma.core.recipe import Recipe, Step
from trilemma.export.gguf import export_gguf
from trilemma.formats.artifact import load_any
from trilemma.model.config import DecoderConfig
from trilemma.model.gguf import gguf_types, read_gguf_header
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.technique import Build

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "Q4_0")
FORMAT_OF = {
    "F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "int8-g32", "Q6_K": "int6-g16-k", "Q5_K": "int5-g32-k",
    "Q4_K": "int4-g32-k", "Q3_K": "int3-g16-k", "Q2_K": "int2-g16-k", "Q5_0": "int5-g32", "Q5_1": "int5-g32-asym",
    "Q4_0": "int4-g32", "Q4_1": "int4-g32-asym", "IQ4_NL": "nl4-g32",
}  # fmt: skip


class Tools:
    """llama-quantize and llama-imatrix of one folder, and the files they made in another."""

    def __init__(self, folder: Path, work: Path, threads: int) -> None:
        self.folder, self.work, self.threads = folder, work, threads
        for name in ("llama-quantize", "llama-imatrix"):
            if not (folder / name).is_file():
                raise InputError(f"There is no '{name}' in '{folder}'. Build llama.cpp's tools and name their folder.")

    def wide(self, yard: Yard) -> Path:
        """The model in f32, for both tools."""
        path = self.work / f"{yard.name}-f32.gguf"
        if not path.exists():
            plain = Recipe(name="f32", steps=(Step(technique="plain", settings={"dtype": "f32"}),))
            export_gguf(apply_recipe(load_any(yard.model), plain, Build()), path)
        return path

    def importance(self, yard: Yard) -> Path:
        """The importance matrix over the calibration windows, head included."""
        path = self.work / f"{yard.name}-{yard.key}.imatrix"
        if path.exists():
            return path
        text, partial = path.with_suffix(".txt"), path.with_suffix(".partial")
        text.write_text(yard.calibration_text, encoding="utf-8")
        done = self._run("llama-imatrix", "-m", self.wide(yard), "-f", text, "-o", partial, "-c", yard.context,
                         "--process-output", "-t", self.threads)  # fmt: skip
        chunks = re.search(r"over (\d+) chunks", done)
        if chunks is None or int(chunks[1]) != len(yard.calibration):
            seen = chunks[1] if chunks else "no"
            raise InputError(f"llama-imatrix saw {seen} chunks; {len(yard.calibration)} windows calibrate ours.")
        partial.rename(path)
        return path

    def quantized(self, yard: Yard, kind: str, *more: object) -> Path:
        """The model in one of llama.cpp's types, `more` being options of llama-quantize."""
        name = "-".join(re.sub(r"\W+", "", str(word)) for word in (kind, *more))
        path = self.work / f"{yard.name}-{yard.key}-{name}.gguf"
        if not path.exists():
            partial = path.with_suffix(".partial")
            self._run("llama-quantize", "--imatrix", self.importance(yard), *more, self.wide(yard), partial, kind,
                      self.threads)  # fmt: skip
            partial.rename(path)
        return path

    def _run(self, tool: str, *arguments: object) -> str:
        command = [str(self.folder / tool), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"{' '.join(command)} failed:\n{(done.stderr or done.stdout)[-1000:]}")
        return done.stderr + done.stdout


def types_in(path: Path, config: DecoderConfig) -> dict[str, str]:
    """Canonical tensor name -> GGUF type, of every matrix."""
    return gguf_types(read_gguf_header(path), config)


def counted(types: Mapping[str, str]) -> dict[str, int]:
    return dict(Counter(types.values()).most_common())


def tensor_bytes(path: Path) -> int:
    """Bytes of all tensors, without header and padding."""
    return sum(tensor.nbytes for tensor in read_gguf_header(path).tensors.values())


def formats_like(types: Mapping[str, str]) -> dict[str, str]:
    """The formats of ours that hold the same grids. Raises InputError for a type that has none."""
    if unknown := sorted({kind for kind in types.values() if kind not in FORMAT_OF}):
        raise InputError(f"No format of ours has the grid of {', '.join(unknown)}.")
    return {name: FORMAT_OF[kind] for name, kind in types.items()}


__all__ = ["FORMAT_OF", "TYPES", "Tools", "counted", "formats_like", "tensor_bytes", "types_in"]
