"""Public functions that join rooms and belong to none: what a command does in a line or two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from trilemma.core.limit import Limit
    from trilemma.core.recipe import Recipe
    from trilemma.core.results import BenchReport
    from trilemma.export import ExportReport
    from trilemma.measure.bench import BenchCandidate
    from trilemma.model.cost import Inspection
    from trilemma.model.model import Model
    from trilemma.runtime.engine import EngineOptions
    from trilemma.search.progress import Progress
    from trilemma.search.result import OptimizeResult
    from trilemma.techniques.apply import CompressResult


def inspect(model: Model | str | Path) -> Inspection:
    """What a model is and would cost, by arithmetic on its headers; no weight is read.

    Args:
        model: a checkpoint folder, an artifact folder, a bare config.json or a hub id.

    Raises:
        CheckpointError: nothing usable is there.
        UnsupportedModelError: an architecture that no family reads.
    """
    from trilemma.formats.artifact import load_any
    from trilemma.model.cost import inspect_model

    return inspect_model(load_any(model) if isinstance(model, str | Path) else model)


def bench(
    models: str | Path | Sequence[str | Path],
    *,
    schemes: Sequence[str] = (),
    runtime: str | Sequence[str] = "native",
    options: EngineOptions | Sequence[EngineOptions] | None = None,
    prompt_tokens: int | Sequence[int] = 128,
    output_tokens: int | Sequence[int] = 32,
    repetitions: int | None = None,
    time: str | float | None = None,
    peak_memory: bool = False,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> BenchReport:
    """What models cost on this machine, interleaved; each as it is, or in every scheme; all lists are crossed.

    Args:
        models: checkpoints, artifacts or bare config.json files (random weights: cost only).
        schemes: such as 'bf16' or 'W4A8-g32'; rounding to nearest, since codes do not change the cost.
        options: threads, KV precision, instruction set; several make several rows of each.
        runtime: names of `trilemma list engines`, interleaved.
        prompt_tokens, output_tokens: lengths of each request.
        repetitions: timed ones, after a discarded round; None goes on until each time per token is known within 2%.
        time: what the repetitions may take, such as '30s'; 20 s for each pair of lengths by default.
        peak_memory: also run each form that lies in a folder in a fresh process, for its high-water mark.

    Returns:
        A row for each model, form, number of threads, runtime and length; the notes hold ratios to a model's first
        row, paired by repetition. See `measure.bench`.

    Raises:
        RecipeError: a scheme that can not be read, or one that needs text.
        InputError: lengths that a model's context does not hold, or a time that can not be read.
    """
    from trilemma.measure.bench import bench as measure
    from trilemma.search.deadline import parse_time

    candidates = _bench_candidates(models, schemes, options)
    return measure(
        candidates, runtime=runtime, prompt_tokens=prompt_tokens, output_tokens=output_tokens,
        repetitions=repetitions, time_s=None if time is None else parse_time(time), seed=seed,
        with_peak_memory=peak_memory, progress=progress,
    )  # fmt: skip


def bench_batches(
    models: str | Path | Sequence[str | Path],
    *,
    batches: Sequence[int] = (1, 2, 4, 8, 16),
    schemes: Sequence[str] = (),
    runtime: str = "native",
    options: EngineOptions | Sequence[EngineOptions] | None = None,
    prompt_tokens: int = 128,
    output_tokens: int = 32,
    repetitions: int = 15,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> BenchReport:
    """Throughput against latency: how much more a machine does with several sequences in each step.

    Args:
        models, schemes, options: as for `bench`.
        batches: numbers of sequences.
        prompt_tokens, output_tokens: of each sequence.

    Returns:
        A row for each model, form and batch; see `measure.batch_sweep`.

    Raises:
        InputError: a batch below 1, or lengths that a model's context does not hold.
    """
    from trilemma.measure.timing.batch_sweep import batch_sweep

    return batch_sweep(
        _bench_candidates(models, schemes, options), batches=batches, prompt_tokens=prompt_tokens,
        output_tokens=output_tokens, runtime=runtime, repetitions=repetitions, seed=seed, progress=progress,
    )  # fmt: skip


def bench_contexts(
    models: str | Path | Sequence[str | Path],
    *,
    contexts: Sequence[int] = (32, 64, 128, 256, 512),
    kv: Sequence[str] = ("none", "bf16", "int8"),
    schemes: Sequence[str] = (),
    runtime: str = "native",
    options: EngineOptions | Sequence[EngineOptions] | None = None,
    repetitions: int = 7,
    point_time_s: float = 20.0,
    memory_bytes: float | None = None,
    prefill: bool = False,
    devices: Sequence[str | Path] = (),
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> BenchReport:
    """Recompute the history, or cache keys and values: time and memory by cache policy and depth.

    Args:
        models, schemes, options: as for `bench`.
        contexts: depths in tokens.
        kv: cache policies; 'none' computes the history again at every step.
        point_time_s: a point whose step would take longer is skipped, with the reason in its row.
        memory_bytes: a memory limit; a note says how many positions each policy holds within it.
        prefill: also time the prefill of a prompt as long as each depth.
        devices: profiles (names of `trilemma list devices`, or files); a note estimates the same there.

    Returns:
        A row for each model, form, policy and depth; the notes say where the lines cross. See `measure.kv_sweep`.

    Raises:
        InputError: depths that a model's context does not hold, an unknown policy or device.
    """
    from trilemma.core.device import load_device
    from trilemma.measure.timing.kv_sweep import kv_sweep
    from trilemma.search.kv_outlook import kv_outlook

    profiles = [load_device(device) for device in devices]
    candidates = _bench_candidates(models, schemes, options)
    report = kv_sweep(
        candidates, policies=kv, contexts=contexts, runtime=runtime, repetitions=repetitions,
        point_time_s=point_time_s, memory_bytes=memory_bytes, with_prefill=prefill, seed=seed, progress=progress,
    )  # fmt: skip
    outlooks = [
        f"{item.name} {item.form} on {kv_outlook(item.model, profile, policies=kv, depth=max(contexts)).sentence()}"
        for item in candidates for profile in profiles
    ]  # fmt: skip
    return report.model_copy(update={"notes": (*report.notes, *outlooks)})


def _bench_candidates(
    models: str | Path | Sequence[str | Path],
    schemes: Sequence[str],
    options: EngineOptions | Sequence[EngineOptions] | None,
) -> list[BenchCandidate]:
    """Each model as it is, or in every scheme, in every variant of options."""
    from trilemma.formats.artifact import short_name
    from trilemma.measure.bench import BenchCandidate, candidates_of, form_of
    from trilemma.runtime.engine import EngineOptions

    given = [models] if isinstance(models, str | Path) else list(models)
    variants = [options or EngineOptions()] if options is None or isinstance(options, EngineOptions) else list(options)
    if not schemes:
        return candidates_of(given, variants)
    made = [(model, scheme, *_made(model, scheme)) for model in given for scheme in schemes]
    return [
        BenchCandidate(short_name(path), form_of(scheme, variant, variants), model, variant, recipe)
        for path, scheme, model, recipe in made for variant in variants
    ]  # fmt: skip


def _made(path: str | Path, scheme: str) -> tuple[Model, Recipe]:
    """A model in a scheme, once for all variants of options."""
    from trilemma.formats.artifact import load_any
    from trilemma.techniques.apply import apply_recipe
    from trilemma.techniques.cost_twin import cost_twin
    from trilemma.techniques.schemes import scheme_to_recipe
    from trilemma.techniques.technique import Build

    recipe = scheme_to_recipe(scheme)
    model = load_any(path)
    random = bool(getattr(model.source, "random", False))
    return (cost_twin(model, recipe) if random else apply_recipe(model, recipe, Build())), recipe


def optimize(
    model: Model | str | Path,
    *,
    limits: Sequence[Limit | str] = (),
    data: str | Path | Sequence[str | Path] | None = None,
    output: str | Path | None = None,
    time: str | float = "10m",
    minimize: str | None = None,
    runtime: str = "native",
    context: int | None = None,
    prepare: Literal["none", "book"] = "none",
    seed: int = 0,
    threads: int | None = None,
    accept_estimates: bool = False,
    device: str | Path | None = None,
    duty_cycle: str | None = None,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
    command: str = "",
) -> OptimizeResult:
    """Find the version of a model to ship within limits, and say how that is known.

    Args:
        model: a checkpoint folder, an artifact or a hub id.
        limits: hard requirements such as 'weights<=50%'; all must PASS.
        data: text files; split by document into calibrate, select and confirm.
        output: folder for the model, recipe.yaml, report.json and report.html; nothing is kept without it.
        time: effort, such as '5m'; at least the baseline and one candidate are measured.
        minimize: metric to be best in within the limits. By default: without limits least tpot with
            ppl_increase<=1%; with limits but none on quality, least kl_mean.
        context: tokens of the quality windows; 512 or the model's own by default.
        prepare: 'book' joins hard line breaks and drops underscores.
        accept_estimates: let an estimate PASS a limit.
        device: a name of `trilemma list devices` or a profile's path, for limits on `battery`: predicted for it.
        duty_cycle: how often that device answers, such as '200 tokens/h' or '5%'.
        force: replace an artifact that is at `output` already.
        progress: called with `search.progress.Progress`.

    Returns:
        best (a trial, or None), front, verdicts, report, exit_code and output.

    Raises:
        InputError: a model, text, limit, time or output that can not be used; nothing is written then.
    """
    from trilemma.report import render
    from trilemma.search.run import optimize as search

    return search(
        model, limits=limits, data=data, output=output, time=time, minimize=minimize, runtime=runtime,
        context=context, prepare=prepare, seed=seed, threads=threads, accept_estimates=accept_estimates,
        device=device, duty_cycle=duty_cycle, force=force, progress=progress, render=render, command=command,
    )  # fmt: skip


def compress(
    model: Model | str | Path,
    output: str | Path,
    *,
    scheme: str | None = None,
    recipe: Recipe | str | Path | None = None,
    bits: float | None = None,
    formats: Sequence[str] = (),
    method: str | None = None,
    tpot_ms: float | None = None,
    calibration: NDArray[np.int32] | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    prepare: Literal["none", "book"] = "none",
    seed: int = 0,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    payback: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> CompressResult:
    """Apply a scheme or a recipe to a model and write the artifact, with what that cost.

    Args:
        model: a checkpoint, an artifact or a hub id; it stays as it is.
        output: folder for the artifact.
        scheme, recipe, bits: one of them: a short name, a recipe (or its YAML file), or how many bits a matrix value
            may take, scales included: each tensor then gets the format that lets the whole lose least (see
            `search.mixed_bits`). A scheme beside bits says what prepares and tunes the model: 'smooth+scales100'.
        formats, method: with `bits`, names of formats to choose from, and how codes are chosen, as schemes say it:
            rtn, gptq, gptaq or guided (the default: least KL, needs gradients).
        tpot_ms: with `bits`, what a token may take on this host, by measured times of each product.
        calibration, data: token windows, or text files to cut them from, for schemes that need them.
        prepare: 'book' joins hard line breaks and drops underscores.
        device: where torch computes: cpu, cuda, or one of several GPUs, cuda:1. Measurements stay on this host's CPU.
        force: replace an artifact that is there already.
        payback: also time both models side by side, for the tokens after which building is repaid.

    Returns:
        Bytes, seconds, `build` (`build_s`, `build_energy_j`) and, when asked for, `payback`.

    Raises:
        RecipeError: not one of scheme, recipe and bits, or one that can not be used.
        OutputError: the output is taken or can not be written.
        DataError: the texts can not be used.
        InputError: no such device here.
    """
    from trilemma.core.errors import RecipeError
    from trilemma.formats.artifact import check_output, load_any, read_artifact
    from trilemma.measure.energy.build_cost import BuildMeter
    from trilemma.search.mixed_bits import METHOD, mix_bits_for
    from trilemma.search.payback import time_payback
    from trilemma.techniques.apply import compress as apply
    from trilemma.techniques.schemes import scheme_to_recipe

    texts = [data] if isinstance(data, str | Path) else data
    if bits is not None and (recipe is not None or calibration is not None):
        raise RecipeError("Bits are shared out on text: give `bits` with `data`, and no recipe or calibration.")
    if (formats or method or tpot_ms is not None) and bits is None:
        raise RecipeError("Formats to choose from, a method and milliseconds a token belong to `bits`.")
    found = None
    with BuildMeter() as meter:
        if bits is not None:
            check_output(output, force=force)
            found = mix_bits_for(
                model, output, bits, texts or (), formats=formats, method=method or METHOD,
                tpot_s=None if tpot_ms is None else tpot_ms / 1e3,
                around=() if scheme is None else scheme_to_recipe(scheme).steps, prepare=prepare, seed=seed,
                threads=threads, device=device, progress=progress,
            )  # fmt: skip
            scheme, recipe = None, found.recipe
        done = apply(
            model, output, scheme=scheme, recipe=recipe, calibration=calibration, data=texts, prepare=prepare,
            seed=seed, threads=threads, device=device, force=force, progress=progress,
        )  # fmt: skip
    build, notes = meter.results(), () if found is None else (str(found),)
    done = done.model_copy(update={"build": build, "notes": notes, "seconds": build["build_s"].value})
    if not payback:
        return done
    original = load_any(model) if isinstance(model, str | Path) else model
    repaid = time_payback(original, read_artifact(Path(output)), done.build, threads=threads)
    return done.model_copy(update={"payback": repaid})


def export_model(
    model: Model | str | Path, output: str | Path, *, to: str = "gguf", requantize: bool = False, force: bool = False
) -> ExportReport:
    """Write a model in another runtime's form; what lies on the same grid goes out bit for bit.

    Args:
        output: the file to write, or the folder for compressed-tensors.
        to: a name of `trilemma list exporters`.
        requantize: round again what the target has no grid for; the report states the relative error.
        force: replace an export that is there already.

    Returns:
        What was written: bytes, storage types, whether every value is the same, and notes on what is not.

    Raises:
        UnknownNameError: no such form.
        OutputError: the file exists, or can not be written.
        InputError: the target has no grid for a tensor, and `requantize` is not set.
    """
    from trilemma.core.errors import OutputError
    from trilemma.export import EXPORTERS
    from trilemma.formats.artifact import load_any

    exporter = EXPORTERS.get(to)
    path = Path(output)
    if path.exists() and not force:
        raise OutputError(f"'{path}' exists already. Give another path, or --force to replace it.")
    loaded = load_any(model) if isinstance(model, str | Path) else model
    return exporter(loaded, path, requantize=requantize)
