"""`trilemma run`: continue a prompt, streaming text to stdout; the figures go to stderr."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from trilemma.cli import options


def run(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue; '-' reads it from stdin.")],
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
    kv: options.KvCache = None,
    threads: options.Threads = None,
    isa: options.IsaChoice = None,
    runtime: options.Runtime = "native",
    context: options.Context = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    json: options.Json = False,
) -> None:
    """Continue a prompt with a model, an artifact or a checkpoint."""
    from trilemma.cli import console
    from trilemma.runtime.engine import EngineOptions, SamplingSettings
    from trilemma.runtime.text_model import open_text_model

    text = sys.stdin.read() if prompt == "-" else prompt
    sampling = SamplingSettings(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    opened = EngineOptions(threads=threads, kv_cache=kv, isa=isa, max_context=context)
    with open_text_model(model, runtime=runtime, options=opened) as text_model:
        sink = None if json else _write
        answer = text_model.complete(text, sampling, stop=stop or [], chat=chat, on_text=sink)
    if json:
        console.print_json({"text": answer.text, "finish_reason": answer.finish_reason, **answer.figures()})
        return
    typer.echo("")
    console.stderr.print(answer.summary(), style="dim", markup=False, soft_wrap=True)


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
