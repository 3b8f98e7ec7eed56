"""Trains a small Llama-style model from text: tokenizer, token file, training, checkpoint, curve and card.

    python examples/pretrain.py --text books.txt.xz --output my-model --time 1h

makes a model of the shape of the shipped hearth-7m. Everything that takes long is kept in
`my-model.training`: after Ctrl-C or a kill the same command goes on where it stopped, and ends in
the same weights. One process; left out are text cleaning, curricula and evaluation on tasks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from pretrain_card import bits_per_byte, continue_greedily, draw_curve, model_card, parameters
from pretrain_progress import bar_to_one, console
from pretrain_text import make_tokenizer, make_tokens
from pydantic import ValidationError
from tokenizers import Tokenizer

from trilemma.core.errors import DataError, InputError, StoppedError, TrilemmaError
from trilemma.core.quantity import format_duration
from trilemma.core.recipe import explain
from trilemma.data.documents import END_OF_TEXT
from trilemma.model.checkpoint import write_checkpoint
from trilemma.model.config import DecoderConfig
from trilemma.model.decoder import Decoder, decoder_to_model
from trilemma.model.families import FAMILIES
from trilemma.model.model import Model
from trilemma.techniques.training import (
    Progress,
    TokenStream,
    TrainingResult,
    TrainingSettings,
    mean_loss,
    next_token_loss,
    seconds_per_step,
    train,
)

VALIDATION_WINDOWS = 32
_OVERHEAD = 1.05  # validation, checkpoints and the tail of the run, as part of its time


def main(
    text: Annotated[list[Path], typer.Option(help="text files (.txt, .xz, .gz); <|endoftext|> ends a document")],
    output: Annotated[Path, typer.Option(help="folder to write the model to; absent, or one that this made")],
    time: Annotated[str, typer.Option(help="train about so long, as 90s, 55m or 1h; sets the steps")] = "",
    steps: Annotated[int, typer.Option(help="optimizer steps, when no --time is given")] = 2000,
    dim: Annotated[int, typer.Option(help="width")] = 256,
    layers: Annotated[int, typer.Option(help="layers")] = 6,
    heads: Annotated[int, typer.Option(help="attention heads")] = 8,
    kv_heads: Annotated[int, typer.Option(help="key-value heads")] = 4,
    ffn: Annotated[int, typer.Option(help="hidden size of the feed-forward block")] = 768,
    vocab: Annotated[int, typer.Option(help="vocabulary, when no --tokenizer is given")] = 8192,
    context: Annotated[int, typer.Option(help="tokens in a window")] = 512,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json to use instead of training one")] = None,
    tokenizer_mb: Annotated[float, typer.Option(help="train the tokenizer on so much of the text")] = 30.0,
    text_mb: Annotated[float, typer.Option(help="use only so much text; 0 is all")] = 0.0,
    prepare: Annotated[str, typer.Option(help="book: join hard-broken lines, drop underscores; none")] = "book",
    batch: Annotated[int, typer.Option(help="windows in a batch")] = 8,
    accumulate: Annotated[int, typer.Option(help="batches in a step")] = 1,
    optimizer: Annotated[str, typer.Option(help="muon or adamw")] = "muon",
    learning_rate: Annotated[float, typer.Option(help="peak learning rate")] = 5e-3,
    schedule: Annotated[str, typer.Option(help="cosine, wsd or constant")] = "wsd",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    precision: Annotated[str, typer.Option(help="f32, or bf16 by autocast")] = "f32",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes torch's choice")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="steps between checkpoints")] = 200,
    seed: Annotated[int, typer.Option(help="of weights and order of the data")] = 0,
) -> None:
    """Train a small Llama-style model from text; the same command resumes a stopped run."""
    wanted = TrainingSettings.model_validate({
        "steps": steps, "batch_size": batch, "context": context, "accumulate": accumulate, "optimizer": optimizer,
        "learning_rate": learning_rate, "schedule": schedule, "decay_fraction": 0.4, "final_fraction": 0.02,
        "device": device, "precision": precision, "threads": threads or None, "seed": seed,
        "checkpoint_every": checkpoint_every, "eval_every": 100,
    })  # fmt: skip
    _check_paths(text, output)
    torch.set_num_threads(threads or torch.get_num_threads())
    work = output.with_name(output.name + ".training")
    work.mkdir(parents=True, exist_ok=True)
    form: Any = prepare  # checked by what reads the text
    fast = make_tokenizer(work, tokenizer, text, form, vocab, int(tokenizer_mb * 1e6))
    tokens, facts = make_tokens(work, fast, text, form, int(text_mb * 1e6))
    decoder = Decoder(_config(fast, dim, layers, heads, kv_heads, ffn, context))
    decoder.initialize(seed)
    held_out = tokens[-min(len(tokens) // 10, VALIDATION_WINDOWS * context) - 1 :]
    stream = TokenStream(tokens[: -len(held_out)], batch, context, seed)
    settings = _planned(work, wanted, time, decoder, stream)
    result = _train(work, decoder, stream, held_out, settings)
    if result.finish != "steps":
        raise StoppedError(f"Stopped at step {result.step} of {settings.steps}; the same command goes on from there.")
    _write(output, work, decoder, fast, settings, result, facts)


def _check_paths(text: list[Path], output: Path) -> None:
    for path in text:
        if not path.is_file():
            raise DataError(f"The text file '{path}' does not exist.")
    used = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if used and not (output / "learning_curve.svg").exists():
        raise InputError(f"'{output}' exists and was not made by this script. Choose another --output or remove it.")


def _config(fast: Tokenizer, dim: int, layers: int, heads: int, kv_heads: int, ffn: int, context: int) -> DecoderConfig:
    end = fast.token_to_id(END_OF_TEXT)
    if end is None:
        raise InputError(f"The tokenizer has no token {END_OF_TEXT}. Use one that has, or let one be trained.")
    return FAMILIES.get("llama").read_config({
        "model_type": "llama", "hidden_size": dim, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": fast.get_vocab_size(),
        "max_position_embeddings": context, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": True, "bos_token_id": end, "eos_token_id": end,
    })  # fmt: skip


def _planned(
    work: Path, wanted: TrainingSettings, time: str, decoder: Decoder, stream: TokenStream
) -> TrainingSettings:
    """`wanted` with the steps that fill `time`; kept, so that a resumed run has the same schedule."""
    if not time:
        return wanted
    seconds = _seconds(time)
    note = work / "plan.json"
    plan = json.loads(note.read_text()) if note.exists() else {}
    if plan.get("seconds") != seconds:
        with console.status("Timing a few steps"):
            pace = seconds_per_step(decoder, stream, next_token_loss, wanted)
        plan = {"seconds": seconds, "steps": max(1, int(seconds / (pace * _OVERHEAD)))}
        note.write_text(json.dumps(plan))
    return wanted.model_copy(update={"steps": plan["steps"]})


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9.]+)\s*(s|m|min|h)", text.strip())
    if match is None:
        raise InputError(f"Can not read --time '{text}'. Expected a number and s, m or h, as 90s, 55m or 1h.")
    return float(match[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[match[2]]


def _train(
    work: Path, decoder: Decoder, stream: TokenStream, held_out: NDArray[np.integer[Any]], settings: TrainingSettings
) -> TrainingResult:
    starts = range(0, len(held_out) - settings.context, settings.context)
    windows = [held_out[at : at + settings.context + 1].astype(np.int64) for at in starts]
    if not windows:
        raise DataError(f"The text has too few tokens for one validation window of {settings.context}. Give more text.")
    together = [windows[at : at + settings.batch_size] for at in range(0, len(windows), settings.batch_size)]
    batches = [torch.from_numpy(np.stack(group)) for group in together]
    with bar_to_one("Training") as (bar, task):

        def told(now: Progress) -> None:
            words = f"loss {now.loss:.3f}, {now.tokens / 1e6:.2f}M tokens, {format_duration(now.seconds_left)} left"
            bar.update(task, completed=now.step / now.steps, description=f"Step {now.step}/{now.steps}, {words}")

        validate = mean_loss(next_token_loss, batches, settings)
        return train(decoder, stream, next_token_loss, settings, folder=work, validate=validate, progress=told)


def _write(
    output: Path, work: Path, decoder: Decoder, fast: Tokenizer, settings: TrainingSettings, result: TrainingResult,
    facts: dict[str, Any],
) -> None:  # fmt: skip
    (work / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT,
        "model_max_length": decoder.config.max_context, "clean_up_tokenization_spaces": False,
    }, indent=2))  # fmt: skip
    model = decoder_to_model(decoder, "bf16")
    # The tokenizer's files are copied from where a model says that it comes from.
    write_checkpoint(Model(model.config, model.source, path=work), output, overwrite=True)
    (output / "learning_curve.svg").write_text(draw_curve(result.curve), encoding="utf-8")
    shutil.copyfile(work / "learning_curve.jsonl", output / "learning_curve.jsonl")
    sample = continue_greedily(decoder, fast, "Once upon a time", 40)
    card = model_card(output.name, decoder.config, settings, result, facts, sample)
    (output / "README.md").write_text(card, encoding="utf-8")
    loss = result.validation_loss or 0.0
    console.print(
        f"{output}: {parameters(decoder.config) / 1e6:.2f}M parameters, validation {loss:.3f} nats a token, "
        f"{bits_per_byte(loss, facts):.3f} bits a byte. {work} may be deleted.",
        highlight=False,
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        typer.run(main)
    except ValidationError as error:
        console.print(f"[red]Error:[/red] {explain(error)}", highlight=False)
        sys.exit(2)
    except TrilemmaError as error:
        console.print(f"[red]Error:[/red] {error}", highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.print("Stopped; the same command starts again from what is kept.")
        sys.exit(130)
