"""One model in one format for every engine: an artifact of ours, and from it a GGUF, a dump and the peers' graphs.

A bare config gets random codes and scales directly in the format, so that a billion parameters take seconds and
little memory; a real model is quantized to nearest. Embedding and head are stored like the rest. A type of GGUF
(Q4_K_M) is made by llama.cpp's own tool from bf16, and the engines read that very file.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from peers.dump import write_dump
from peers.engines_of import A16, GGUF_TYPES, EngineFailedError, Files, Setup, run_worker
from peers.ways import weight_kinds
from trilemma.core.recipe import Recipe, Step
from trilemma.export.gguf import export_gguf
from trilemma.formats.artifact import load_any, write_artifact
from trilemma.formats.random_weights import with_random_weights
from trilemma.model.model import Activation
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.technique import Build


def build(source: Path, storage: str, folder: Path, setup: Setup) -> Files:
    """Write into `folder` what the present engines need; what is there already is kept, if it has room enough."""
    name = f"{source.name}-{storage}"
    if storage.endswith(A16):
        files = build(source, storage.removesuffix(A16), folder, setup)
        if not _roomy(folder / name, source):
            shutil.rmtree(folder / name)
        if not (folder / name).exists():
            write_model(source, storage, folder / name)
        return replace(files, artifact=folder / name)
    if not _roomy(folder / name, source):
        for old in _made(folder, name, storage):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    artifact, gguf, dump = folder / name, folder / f"{name}.gguf", folder / f"{name}.dump"
    if storage in GGUF_TYPES:
        if not gguf.exists():
            quantized(build(source, "bf16", folder, setup).gguf, gguf, storage, setup)
        return Files(gguf, gguf, dump, {})
    present = setup.present(storage)
    if not artifact.exists():
        write_model(source, storage, artifact)
    if "llama.cpp" in present and not gguf.exists():
        export_gguf(load_any(artifact), gguf)
    built = {}
    if storage.startswith("int"):
        built = {f"openvino-{kind}": folder / f"{name}-{kind}.xml" for kind in weight_kinds(storage)}
        built["onnxruntime"] = folder / f"{name}.onnx"
    for label, path in built.items():
        engine = label.partition("-")[0]
        if engine not in present or path.exists():
            continue
        if not dump.exists():
            write_dump(artifact, dump)
        task = {"do": "build", "dump": str(dump), "model": str(path), "weights": label.partition("-")[2]}
        run_worker(setup.pythons[engine], engine, task)
    return Files(artifact, gguf, dump, built)


def _made(folder: Path, name: str, storage: str) -> list[Path]:
    """All that `build` leaves of one model in one format."""
    kinds = weight_kinds(storage) if storage.startswith("int") else []
    ends = ["", ".gguf", ".dump", ".onnx", ".bin", *(f"-{kind}.{end}" for kind in kinds for end in ("xml", "bin"))]
    return [folder / f"{name}{end}" for end in ends]


def _roomy(artifact: Path, source: Path) -> bool:
    """Whether a model made earlier holds as many positions as its source does now (see `stretched`)."""
    if not (artifact / "model.safetensors").exists():
        return True
    return load_any(artifact).config.max_context >= load_any(source).config.max_context


def quantized(source: Path, target: Path, kind: str, setup: Setup) -> None:
    """A GGUF file in one of llama.cpp's mixes, by llama-quantize beside llama-bench."""
    tool = Path(str(setup.llama_bench)).with_name("llama-quantize")
    if setup.llama_bench is None or not tool.is_file():
        raise EngineFailedError(f"'{kind}' is made by llama-quantize; name a llama-bench that has it beside itself")
    part = target.with_suffix(".part")
    done = subprocess.run([str(tool), str(source), str(part), kind], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineFailedError(f"llama-quantize ended with {done.returncode}: {(done.stderr or done.stdout)[-400:]}")
    part.rename(target)


def stretched(source: Path, folder: Path, context: int) -> Path:
    """A bare config with room for `context` positions: its weights are random, so none was trained for fewer."""
    model = load_any(source)
    if not model.source.random or model.config.max_context >= context:
        return source
    found = json.loads((source / "config.json").read_text(encoding="utf-8"))
    target = folder / "stretched" / source.name
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps({**found, "max_position_embeddings": context}), encoding="utf-8")
    return target


def sizes_of(files: Files) -> dict[str, dict[str, int]]:
    """Bytes of the weights as each engine has them on disk; OpenVINO's and ONNX Runtime's scales may be wider."""
    own = files.artifact / "model.safetensors" if files.artifact.is_dir() else files.artifact
    found = {"ours": own, "llama.cpp": files.gguf}
    found |= {name: path.with_suffix(".bin") for name, path in files.built.items()}
    return {"bytes": {name: path.stat().st_size for name, path in found.items() if path.exists()}}


def write_model(source: Path, storage: str, artifact: Path) -> None:
    """The model of `source` as an artifact in a format, `-a16` behind it for bf16 inputs."""
    model = load_any(source)
    weights = storage.removesuffix(A16)
    rounded: Activation | None = "bf16" if weights != storage else None
    if model.source.random:
        inputs = (lambda _: rounded) if rounded else None
        made = with_random_weights(model, lambda _: weights, activation_of=inputs)
        write_artifact(made, artifact, Recipe(name=storage, steps=()))
        return
    settings: dict[str, object] = {"weights": weights, "embedding": weights, "head": weights, "scale": "absmax"}
    if rounded:
        settings["activations"] = rounded
    step = Step(technique="rtn", settings=settings)
    if storage in ("f32", "f16", "bf16"):
        step = Step(technique="plain", settings={"dtype": storage})
    recipe = Recipe(name=storage, steps=(step,))
    write_artifact(apply_recipe(model, recipe, Build()), artifact, recipe)


__all__ = ["build", "sizes_of", "stretched", "write_model"]
