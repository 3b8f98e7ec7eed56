"""`trilemma run`: continue a prompt, streaming text to stdout; the figures go to stderr.

With `--draft` or `--lookup` several tokens come a pass; with `--cascade` a small model answers first
(`cascade.py` beside this file). Which settings go together is checked here; the work is the runtime's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trilemma.cli import options

if TYPE_CHECKING:
    from trilemma.runtime.engine import EngineOptions, SamplingSettings
    from trilemma.runtime.text_model import TextModel


def run(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint or artifact folder, GGUF file, bare config.json or hub id. Left out with --cascade.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; '-' reads it from stdin.", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens to produce.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Keep the k most likely tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Keep this share of probability.")] = 1.0,
    min_p: Annotated[float, typer.Option("--min-p", min=0.0, max=1.0, help="Drop below this share of the best.")] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", min=0.01, help="Above 1, seen tokens become less likely.")
    ] = 1.0,
    seed: options.Seed = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Stop before this text. May be repeated.")] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft", help="Smaller model with the same tokenizer that proposes tokens; same text, other speed."
        ),
    ] = None,
    lookup: Annotated[
        bool, typer.Option("--lookup", help="Propose what followed the last time these tokens came; same text.")
    ] = False,
    draft_tokens: Annotated[
        int | None,
        typer.Option(
            "--draft-tokens", min=1, help="Proposals a pass; chosen from measured gain, and none, by default."
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also time plain decoding, interleaved, and state the gain or loss.")
    ] = False,
    cascade: Annotated[
        str | None,
        typer.Option("--cascade", help="SMALL,LARGE or a cascade.json: the small model answers where it is confident."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold", min=0.0, max=1.0, help="Of --cascade, not calibrated: least mean token probability."
        ),
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            "--limit", help="Calibrate --cascade to it: 'agreement>=95%' or 'ppl_increase<=2%'. Needs --data."
        ),
    ] = None,
    data: options.Data = None,
    prompts: Annotated[
        int,
        typer.Option("--prompts", min=16, help="Prompts cut from --data to calibrate a cascade; half of them judge."),
    ] = 200,
    prepare: options.PrepareText = "none",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Keep the calibrated cascade in this file.")
    ] = None,
    force: options.Force = False,
    kv: options.KvCache = None,
    threads: options.Threads = None,
    isa: options.IsaChoice = None,
    runtime: options.Runtime = "native",
    context: options.Context = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    json: options.Json = False,
) -> None:
    """Continue a prompt with a model; faster with a draft (the same text), or with a small model before a large one."""
    from trilemma.cli import cascade as cascades
    from trilemma.cli import console
    from trilemma.core.errors import InputError
    from trilemma.runtime.engine import EngineOptions, SamplingSettings

    speculative = draft is not None or lookup
    _check_together(
        speculative=speculative, both=draft is not None and lookup, draft_tokens=draft_tokens, measure=measure,
        cascade=cascade, threshold=threshold, limit=limit, data=data, output=output, runtime=runtime,
    )  # fmt: skip
    sampling = SamplingSettings(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    opened = EngineOptions(threads=threads, kv_cache=kv, isa=isa, max_context=context)
    if cascade is not None:
        if prompt is not None:
            raise InputError(f"--cascade names the models, so '{model}' is one too many. Give the prompt alone.")
        rule = cascades.Request(cascade, threshold, limit or [], data or [], prompts, prepare, output, force, seed)
        cascades.run_cascade(rule, _read(model), sampling, opened, stop or [], chat=chat, json=json)
        return
    if model is None or prompt is None:
        raise InputError("Give a model and a prompt: trilemma run MODEL PROMPT ('-' reads the prompt from stdin).")
    text = _read(prompt) or ""
    with _open(model, draft, lookup, draft_tokens, runtime, opened) as text_model:
        answer = text_model.complete(text, sampling, stop=stop or [], chat=chat, on_text=None if json else write)
        if not json:
            typer.echo("")
            console.stderr.print(answer.summary(), style="dim", markup=False, soft_wrap=True)
        found = _speculation(text_model, text, chat, sampling, measure, json) if speculative else {}
    if json:
        shown = {"text": answer.text, "finish_reason": answer.finish_reason, **answer.figures()}
        console.print_json(shown | found)


def write(piece: str) -> None:
    """Show a piece of text at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def _read(prompt: str | None) -> str | None:
    return sys.stdin.read() if prompt == "-" else prompt


def _open(
    model: str, draft: str | None, lookup: bool, draft_tokens: int | None, runtime: str, opened: EngineOptions
) -> TextModel:
    if draft is not None or lookup:
        from trilemma.runtime.speculative import open_speculative

        return open_speculative(model, draft, draft_tokens=draft_tokens, options=opened)
    from trilemma.runtime.text_model import open_text_model

    return open_text_model(model, runtime=runtime, options=opened)


def _speculation(
    text_model: TextModel, text: str, chat: bool, sampling: SamplingSettings, measure: bool, json: bool
) -> dict[str, object]:
    """What speculation did; on request also the measured gain. Said on stderr, or returned for JSON."""
    from trilemma.cli import console
    from trilemma.measure.timing.speculation import measure_speculation
    from trilemma.runtime.speculative import SpeculativeEngine

    engine = text_model.engine
    assert isinstance(engine, SpeculativeEngine)
    assert engine.last is not None
    figures = engine.last.figures
    record: dict[str, object] = {"draft": engine.draft.name, **figures.record()}
    if not json:
        console.stderr.print(f"{engine.draft.name}: {figures.summary()}", style="dim", markup=False, soft_wrap=True)
    if measure:
        with console.progress("plain against speculative") as update:
            report = measure_speculation(engine, [text_model.tokens_of(text, chat=chat)], sampling, progress=update)
        record["measured"] = {**report.model_dump(mode="json"), "outcome": report.outcome}
        if not json:
            console.stderr.print(report.summary(), style="dim", markup=False, soft_wrap=True)
    return {"speculation": record}


def _check_together(
    *, speculative: bool, both: bool, draft_tokens: int | None, measure: bool, cascade: str | None,
    threshold: float | None, limit: list[str] | None, data: list[Path] | None, output: Path | None, runtime: str,
) -> None:  # fmt: skip
    """Raises InputError for options that contradict each other or that nothing would use."""
    from trilemma.core.errors import InputError

    wrong = {
        "--draft and --lookup both propose tokens. Choose one.": both,
        "--draft-tokens and --measure belong to speculation. Add --draft MODEL or --lookup.": (
            not speculative and (draft_tokens is not None or measure)
        ),
        "--cascade and speculation can not be combined yet. Choose one.": speculative and cascade is not None,
        f"Speculation and cascades run on the native engine, not on '{runtime}'. Leave --runtime out.": (
            runtime != "native" and (speculative or cascade is not None)
        ),
        "--threshold, --limit, --data and --output belong to --cascade. Add --cascade SMALL,LARGE.": (
            cascade is None and bool(limit or data or output or threshold is not None)
        ),
        "--limit calibrates the threshold; it can not be given as well. Leave --threshold out.": (
            bool(limit) and threshold is not None
        ),
        "Calibrating a cascade needs both a limit and text: --limit 'agreement>=95%' --data FILE.": (
            bool(limit) != bool(data)
        ),
        "--output keeps a calibrated cascade; there is none without --limit and --data.": (
            output is not None and not limit
        ),
    }
    for message, holds in wrong.items():
        if holds:
            raise InputError(message)
