"""Options that several commands share, each with its one-line help, so that they read the same everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

Kv = Literal["none", "f32", "bf16", "int8", "int4"]
Isa = Literal["scalar", "avx2", "avxvnni", "avx512", "avx512bf16", "amx", "neon"]
TableForm = Literal["md", "csv", "json", "jsonl"]

Model = Annotated[
    str,
    typer.Argument(help="Checkpoint folder, artifact folder, GGUF file, bare config.json (random weights) or hub id."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads; all usable cores by default.")]
KvCache = Annotated[
    Kv | None,
    typer.Option("--kv", help="Precision of the KV cache (none recomputes); the model's own by default."),
]
IsaChoice = Annotated[Isa | None, typer.Option("--isa", help="Instruction set; the best one here by default.")]
Runtime = Annotated[str, typer.Option("--runtime", help="Engine to run and measure on; see `trilemma list engines`.")]
Context = Annotated[
    int | None, typer.Option("--context", min=2, help="Tokens a window; the model's own, 2048 at most.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Data = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        help="Text (.txt, .json, .jsonl, also .xz, .gz; chat messages too); documents end with <|endoftext|>. "
        "FILE#FIELD takes that field of its rows, FILE:WEIGHT gives it a share of the calibration. May be repeated.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that is there already.")]
TextTokens = Annotated[int, typer.Option("--max-tokens", min=2, help="Tokens of text for each domain.")]
PrepareText = Annotated[
    Literal["none", "book"],
    typer.Option("--prepare", help="book: join hard line breaks, drop underscores (as the shipped model was trained)."),
]
_NAMED = typer.Option("--data", help="Text file, or name=file for a domain of its own. May be repeated.")
NamedData = Annotated[list[str], _NAMED]
SomeNamedData = Annotated[list[str] | None, _NAMED]
TorchDevice = Annotated[
    str, typer.Option("--device", help="Where torch computes: cpu, cuda, or one of several GPUs, cuda:1.")
]
OtherDevice = Annotated[
    str | None,
    typer.Option("--device", help="Predict for a device that is not here: phone, raspberry-pi-5, laptop, or a .yaml."),
]
Duty = Annotated[
    str | None,
    typer.Option(
        "--duty-cycle", help="With --device: how often it answers, '200 tokens/h' or '5%', for battery hours."
    ),
]


def split_names(given: Sequence[str] | None) -> list[str]:
    """'a,b' and repeated options alike as one list; an empty name is left out."""
    return [name.strip() for text in given or () for name in text.split(",") if name.strip()]


def refuse_unused(views: Mapping[str, bool], belongs: Mapping[tuple[str, ...], Mapping[str, object]]) -> None:
    """Refuse two views at once, and options that the view asked for would pass over in silence.

    Args:
        views: options of which one at most may be given -> whether it is.
        belongs: those that mean something with one of these views alone: option -> its value.

    Raises:
        InputError: the first of them.
    """
    from trilemma.core.errors import InputError

    asked = [name for name, given in views.items() if given]
    if len(asked) > 1:
        raise InputError(f"{' and '.join(asked)} are different questions. Ask one at a time.")
    for owners, options in belongs.items():
        for option, value in options.items():
            if value and not set(asked) & set(owners):
                raise InputError(
                    f"{option} has no meaning without {' or '.join(owners)}. Add it, or leave {option} out."
                )
