"""The gain of a recipe, step by step: every prefix is built once, and all of them are measured side by side.

Steps are applied one after another exactly as `apply_recipe` does, so the last bar is the recipe's own
result. Times of all prefixes come from one interleaved run; a step's ratio is paired with the prefix
before it. Models of random weights are imitated by cost twins and have no quality. Steps interact: what
one gains holds for this order.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from trilemma.core.environment import read_environment
from trilemma.core.errors import InputError, RecipeError, TrilemmaError
from trilemma.core.measurement import Measurement
from trilemma.core.recipe import Recipe, Step
from trilemma.core.waterfall import Waterfall, WaterfallStep
from trilemma.data.documents import Prepare
from trilemma.data.windows import TokenSet
from trilemma.formats.artifact import is_artifact, read_recipe
from trilemma.measure.memory.held import engine_memory
from trilemma.measure.quality.evaluate import build_reference
from trilemma.measure.quality.figures import evaluate
from trilemma.measure.stats import paired_ratio
from trilemma.measure.timing.settle import Progress
from trilemma.measure.timing.speed import SpeedRun
from trilemma.model.model import Model
from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime import open_engine
from trilemma.runtime.engine import Engine, EngineOptions, KvCache
from trilemma.search.diagnosis.deployed import open_deployed
from trilemma.search.texts import Texts, read_texts
from trilemma.techniques.apply import apply_recipe, check_recipe, needs_calibration
from trilemma.techniques.cost_twin import cost_twin
from trilemma.techniques.schemes import scheme_to_recipe
from trilemma.techniques.technique import Build

QUALITY_TOKENS = 8192
QUALITY = ("perplexity", "ppl_increase", "kl_mean", "top1_agreement")
COST = ("weights_bytes", "engine_memory_bytes", "ttft_s", "tpot_s")


@dataclass(frozen=True)
class _Prefix:
    """The model after one step, the step itself, and what building it took."""

    name: str
    model: Model
    step: Step | None
    build_s: float


def read_any_recipe(given: str | Path) -> Recipe:
    """A recipe from an artifact folder, a recipe.yaml, or a scheme's name.

    Raises:
        RecipeError: it can not be read, or has no steps.
    """
    path = Path(given)
    if is_artifact(path):
        recipe = read_recipe(path)
    elif path.suffix in (".yaml", ".yml") or path.is_file():
        recipe = Recipe.read(path)
    else:
        recipe = scheme_to_recipe(str(given))
    if not recipe.steps:
        raise RecipeError(f"The recipe '{given}' has no steps, so there is nothing to attribute.")
    return recipe


def waterfall(
    model: str | Path,
    recipe: Recipe | str | Path,
    *,
    data: Sequence[str | Path] | None = None,
    prepare: Prepare = "none",
    prompt_tokens: int = 128,
    output_tokens: int = 32,
    repetitions: int = 7,
    quality_tokens: int = QUALITY_TOKENS,
    threads: int | None = None,
    kv: KvCache | None = None,
    progress: Progress | None = None,
) -> Waterfall:
    """Build and measure every prefix of a recipe.

    Args:
        model: what the recipe starts from.
        recipe: a Recipe, a recipe.yaml, an artifact folder, or a scheme.
        data: text files: calibration where a step needs it, and quality of every prefix on another part of them.
        quality_tokens: of that other part.

    Raises:
        RecipeError: a recipe that can not be used, or one that needs text and got none.
        InputError: lengths that the model's context does not hold.
        DataError: texts that can not be used.
    """
    chosen = recipe if isinstance(recipe, Recipe) else read_any_recipe(recipe)
    opened = open_deployed(model)
    check_recipe(chosen, opened.model.config)
    if prompt_tokens + output_tokens > opened.model.config.max_context:
        raise InputError(
            f"{prompt_tokens} prompt and {output_tokens} output tokens are more than the "
            f"{opened.model.config.max_context} that this model takes. Ask for fewer with --prompt and --output."
        )
    texts = None
    if data and not opened.twin and opened.model.path is not None:
        context = min(512, opened.model.config.max_context)
        texts = read_texts(data, Tokenizer.load(opened.model.path), context, chosen.seed, prepare)
    prefixes = _build(opened.model, chosen, opened.twin, texts, threads, progress)
    options = EngineOptions(threads=threads, kv_cache=kv, max_context=prompt_tokens + output_tokens)
    with ExitStack() as stack:
        engines = {item.name: _open(item.model, options, texts, stack) for item in prefixes}
        found, noisy = _cost(engines, prompt_tokens, output_tokens, repetitions, progress)
        notes = [f"the machine was not quiet: {noisy}"] if noisy else []
        if texts is not None:
            _quality(opened.model, engines, texts.token_set("select", quality_tokens), found, progress)
        elif not opened.twin:
            notes.append("without --data there is no quality beside the cost")
        first = next(iter(engines.values()))
        environment = read_environment(isa=first.isa, threads=first.threads, recipe_hash=chosen.hash)
    return Waterfall(
        model=opened.name, recipe=chosen.name or chosen.hash, twin=opened.twin, environment=environment,
        prompt_tokens=prompt_tokens, output_tokens=output_tokens, steps=tuple(_steps(prefixes, found)),
        notes=(*notes, "steps in the recipe's order; another order could share the same total out differently"),
    )  # fmt: skip


def _build(
    model: Model, recipe: Recipe, twin: bool, texts: Texts | None, threads: int | None, progress: Progress | None
) -> list[_Prefix]:
    if not twin and texts is None and needs_calibration(recipe, model.config):
        raise RecipeError("A step of this recipe needs calibration text. Give some with --data.")
    build = Build(
        calibration=None if texts is None else texts.calibration, seed=recipe.seed, threads=threads, progress=progress,
        original=model,
    )  # fmt: skip
    prefixes = [_Prefix("unmodified", model, None, 0.0)]
    for step in recipe.steps:
        alone = recipe.model_copy(update={"steps": (step,)})
        began = time.perf_counter()
        before = prefixes[-1].model
        made = _imitate(before, alone, step) if twin else apply_recipe(before, alone, replace(build))
        prefixes.append(_Prefix(_name(step, prefixes), made, step, time.perf_counter() - began))
    return prefixes


def _imitate(model: Model, recipe: Recipe, step: Step) -> Model:
    try:
        return cost_twin(model, recipe)
    except TrilemmaError as error:
        raise RecipeError(f"The step '{step.technique}' can not be shown without real weights: {error}") from None


def _name(step: Step, prefixes: Sequence[_Prefix]) -> str:
    """The technique with the setting that says most, and a number where the same comes twice."""
    said = [str(value) for key, value in step.settings.items() if key in ("weights", "dtype", "precision", "share")]
    name = " ".join([step.technique, *said])
    times = sum(prefix.name.split(" #")[0] == name for prefix in prefixes)
    return f"{name} #{times + 1}" if times else name


def _open(model: Model, options: EngineOptions, texts: Texts | None, stack: ExitStack) -> Engine:
    longest = max(options.max_context or 0, 0 if texts is None else texts.context)
    engine = open_engine(model, options=options.model_copy(update={"max_context": longest}))
    stack.callback(engine.close)
    return engine


def _cost(
    engines: dict[str, Engine], prompt_tokens: int, output_tokens: int, repetitions: int, progress: Progress | None
) -> tuple[dict[str, dict[str, Measurement]], str | None]:
    run = SpeedRun(engines, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    try:
        run.warm_up()
        for turn in range(repetitions):
            run.repeat()
            if progress is not None:
                progress(turn + 1, repetitions, "speed of every step")
        speeds = run.results()
        noisy = run.reason
    finally:
        run.close()
    return {name: {**engine_memory(engine), **speeds[name]} for name, engine in engines.items()}, noisy


def _quality(
    base: Model,
    engines: dict[str, Engine],
    token_set: TokenSet,
    found: dict[str, dict[str, Measurement]],
    progress: Progress | None,
) -> None:
    with tempfile.TemporaryDirectory(prefix="trilemma-reference-") as folder:
        reference = build_reference(base, token_set, folder, progress=progress)
        for name, engine in engines.items():
            found[name] |= evaluate(engine, reference, progress=progress)


def _steps(prefixes: list[_Prefix], found: dict[str, dict[str, Measurement]]) -> list[WaterfallStep]:
    steps: list[WaterfallStep] = []
    for index, prefix in enumerate(prefixes):
        ours = {name: found[prefix.name][name] for name in (*COST, *QUALITY) if name in found[prefix.name]}
        ratios: dict[str, tuple[float, float | None, float | None]] = {}
        for metric in COST if index else ():
            before = steps[-1].measurements[metric]
            ratios[metric] = _ratio(before, ours[metric])
        step = prefix.step
        steps.append(WaterfallStep(
            name=prefix.name, technique=step.technique if step else "", settings=step.settings if step else {},
            build_s=prefix.build_s, measurements=ours, ratios=ratios,
        ))  # fmt: skip
    return steps


def _ratio(before: Measurement, after: Measurement) -> tuple[float, float | None, float | None]:
    if before.samples and len(before.samples) == len(after.samples):
        found = paired_ratio(before.samples, after.samples)
        return found.value, found.low, found.high
    share = (after.value or 0.0) / (before.value or 1.0)
    return share, share, share
