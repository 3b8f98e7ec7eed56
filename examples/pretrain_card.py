"""What `pretrain.py` leaves beside the weights: the learning curve as a picture, and the model card."""

from __future__ import annotations

import math
from typing import Any

import torch
from tokenizers import Tokenizer

from trilemma.core.quantity import format_duration
from trilemma.model.config import DecoderConfig
from trilemma.model.decoder import Decoder
from trilemma.report.svg import Drawing, linear_ticks
from trilemma.techniques.training import CurvePoint, TrainingResult, TrainingSettings

STYLE = (
    "svg{background:#fff}text{font:13px sans-serif;fill:#444}.grid{stroke:#e2e2e2}polyline{fill:none}"
    ".training{stroke:#7aa6c2;stroke-width:2}.validation{stroke:#c4513a;stroke-width:2}"
)
LEFT, RIGHT, TOP, BOTTOM = 60, 620, 40, 340


def draw_curve(curve: list[CurvePoint]) -> str:
    """A picture that stands alone: training and validation loss over tokens seen."""
    lines = {
        "training": [(p.tokens / 1e6, p.train_loss) for p in curve if p.train_loss is not None],
        "validation": [(p.tokens / 1e6, p.validation_loss) for p in curve if p.validation_loss is not None],
    }
    losses = [y for line in lines.values() for _, y in line]
    pad = 0.05 * (max(losses) - min(losses)) or 0.1
    low, high, most = min(losses) - pad, max(losses) + pad, max(x for line in lines.values() for x, _ in line)

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (RIGHT - LEFT) * x / most, TOP + (BOTTOM - TOP) * (high - y) / (high - low)

    drawing = Drawing(660, 400, "Learning curve")
    for loss in linear_ticks(low, high):
        drawing.line(LEFT, place(0, loss)[1], RIGHT, place(0, loss)[1], "grid")
        drawing.text(LEFT - 8, place(0, loss)[1] + 4, f"{loss:.3g}", "words", anchor="end")
    for tokens in linear_ticks(0, most):
        drawing.text(place(tokens, low)[0], BOTTOM + 20, f"{tokens:.3g}", "words", anchor="middle")
    for row, (name, line) in enumerate(lines.items()):
        drawing.polyline([place(x, y) for x, y in line], name)
        drawing.line(430, 60 + 18 * row, 454, 60 + 18 * row, name)
        drawing.text(462, 64 + 18 * row, f"{name}, last {line[-1][1]:.3f}", "words")
    drawing.text((LEFT + RIGHT) / 2, 386, "million tokens seen", "words", anchor="middle")
    drawing.text(LEFT, 24, "loss, nats a token", "words")
    picture = str(drawing.render()).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return picture.replace("</title>", f"</title><style>{STYLE}</style>", 1)


def parameters(config: DecoderConfig) -> int:
    return sum(math.prod(shape) for shape in config.tensor_shapes().values())


@torch.no_grad()
def continue_greedily(decoder: Decoder, fast: Tokenizer, prompt: str, count: int) -> str:
    """Greedy continuation; everything is computed anew for each token, which is fine for so few."""
    device = next(decoder.parameters()).device
    ids = fast.encode(prompt).ids
    start = len(ids)
    for _ in range(count):
        logits = decoder(torch.tensor([ids[-decoder.config.max_context :]], device=device), last_only=True)
        ids.append(int(logits[0, -1].argmax()))
    return str(fast.decode(ids[start:]))


def model_card(
    name: str, config: DecoderConfig, settings: TrainingSettings, result: TrainingResult, facts: dict[str, Any],
    sample: str,
) -> str:  # fmt: skip
    """README.md of the model: what it is, how it was made, how good it became."""
    attention, dense = config.layers[0].attention, config.layers[0].ffn
    assert attention is not None
    assert dense is not None
    made_from, windows = facts["made_from"], settings.batch_size * settings.accumulate
    files = ", ".join(file for file, _ in made_from["files"])
    loss = math.nan if result.validation_loss is None else result.validation_loss
    return f"""# {name}

A Llama-style decoder of {parameters(config) / 1e6:.2f}M parameters: dim {config.dim}, {len(config.layers)} layers, \
{attention.heads} heads, {attention.kv_heads} KV heads, head_dim {attention.head_dim}, ffn {dense.hidden}, vocabulary \
{config.vocab_size} (byte-level BPE), context {config.max_context}, tied, bf16.

Made by `examples/pretrain.py`: {result.tokens / 1e6:.2f}M tokens seen, of {facts["tokens"] / 1e6:.2f}M in {files} \
(text preparation: {made_from["prepare"]}); {result.step} steps of {windows} windows, {settings.optimizer}, \
learning rate {settings.learning_rate:g}, {settings.schedule}, {settings.precision}, seed {settings.seed}; \
{format_duration(result.seconds)} on {settings.device}.

| figure | value |
|---|---|
| training loss, mean of the last steps | {result.train_loss:.3f} nats a token |
| validation loss, on the end of the text, held out | {loss:.3f} nats a token |
| validation perplexity | {math.exp(loss):.2f} |
| validation bits a byte, at the whole text's tokens a byte | {bits_per_byte(loss, facts):.3f} |

![learning curve](learning_curve.svg)

Greedy from "Once upon a time": "{sample}"
"""


def bits_per_byte(loss: float, facts: dict[str, Any]) -> float:
    """A loss in nats a token as bits a byte; tokens a byte are the whole text's mean."""
    return loss / math.log(2) * float(facts["tokens"]) / float(facts["text_bytes"])
