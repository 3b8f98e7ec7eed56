"""A model as it is deployed: what a path holds, or a twin of random weights that costs the same.

The engine runs checkpoints and artifacts themselves. A GGUF file belongs to another runtime: its
structure and the nearest formats of ours make a twin for cost, and the difference in bytes is stated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trilemma.formats import FORMATS
from trilemma.formats.artifact import load_any, short_name, weights_bytes
from trilemma.formats.random_weights import with_random_weights
from trilemma.model.config import Attention, DecoderConfig, Dense
from trilemma.model.gguf import find_gguf, gguf_config, gguf_types, read_gguf_header, type_bits
from trilemma.model.model import Model
from trilemma.model.rope import make_rope
from trilemma.model.sources import RandomSource

_NEAREST = {
    "F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "int8-g32", "Q4_0": "int4-g32", "Q4_1": "int4-g32-asym",
    "Q5_0": "int5-g32", "Q5_1": "int5-g32-asym", "Q4_K": "int4-g32-k", "Q5_K": "int5-g32-k", "Q6_K": "int6-g16-k",
    "Q2_K": "int2-g16-k", "Q3_K": "int3-g16-k", "IQ4_NL": "nl4-g32",
}  # fmt: skip
_BITS = {
    "int8-g32": 8.5, "int8-g128": 8.125, "int6-g32": 6.5, "int4-g32-asym": 5.0, "int4-g32": 4.5, "int4-g128": 4.125,
    "int3-g16-k": 3.4375, "int2-g16-k": 2.625,
}  # fmt: skip


@dataclass(frozen=True)
class Deployed:
    """`model` runs in the engine; `what` says in words what it is; a `twin` has random weights and no quality.

    foreign: the file is another runtime's, so that the commands here do not take it.
    """

    name: str
    model: Model
    twin: bool
    what: str
    foreign: bool = False


def open_deployed(path: str | Path) -> Deployed:
    """Open a checkpoint, an artifact, a bare config.json, a hub id, or a GGUF file or folder.

    Raises:
        CheckpointError: nothing usable is there, or a damaged GGUF header.
        UnsupportedModelError: an architecture that can not be run or translated.
    """
    file = find_gguf(Path(path))
    if file is not None:
        return _open_gguf(file)
    model = load_any(path)
    if getattr(model.source, "random", False):
        return Deployed(short_name(path), model, True, "random weights in the shapes of a bare config.json: cost only")
    return Deployed(short_name(path), model, False, "the model itself")


def nearest_format(ggml_type: str) -> str:
    """The format of ours whose kernels and bytes come closest to a GGML type."""
    if ggml_type in _NEAREST:
        return _NEAREST[ggml_type]
    bits = type_bits(ggml_type)
    return min(_BITS, key=lambda name: abs(_BITS[name] - bits))


def _open_gguf(file: Path) -> Deployed:
    header = read_gguf_header(file)
    config = gguf_config(header)
    types = gguf_types(header, config)
    formats = {name: nearest_format(kind) for name, kind in types.items()}
    model = with_random_weights(Model(config, RandomSource(config)), lambda name: formats[name])
    pairs = dict.fromkeys((kind, formats[name]) for name, kind in types.items())
    said = ", ".join(f"{kind} as {name}" for kind, name in pairs)
    what = (
        f"a twin of random weights with the GGUF file's structure in the nearest formats here ({said}): "
        f"{weights_bytes(model) / 1e6:.2f} MB for the file's {header.weights_bytes / 1e6:.2f} MB; "
        "it shows what binds on this machine in this engine"
    )
    return Deployed(file.name, model, True, what, foreign=True)


def restructured(model: Model, config: DecoderConfig) -> Model:
    """Random weights of another structure in the formats and input precisions of `model`; tensors keep their names."""
    known = set(model.names())

    def twin_of(name: str) -> str:
        return name if name in known else "embedding.weight"

    formats = {name: model.format_of(twin_of(name)) for name, s in config.tensor_shapes().items() if len(s) == 2}
    bare = Model(config, RandomSource(config), run=model.run)
    return with_random_weights(
        bare, lambda name: formats[name], activation_of=lambda name: model.linear(twin_of(name)).activation
    )


def narrower(config: DecoderConfig, share: float) -> DecoderConfig:
    """The same with every feed-forward block at about `share` of its width, a multiple of 32."""
    layers = []
    for layer in config.layers:
        if layer.ffn is not None:
            width = max(32, round(layer.ffn.hidden * share / 32) * 32)
            layer = layer.model_copy(update={"ffn": layer.ffn.model_copy(update={"hidden": width})})
        layers.append(layer)
    return config.model_copy(update={"layers": tuple(layers)})


def shallower(config: DecoderConfig, share: float) -> DecoderConfig:
    """The same with the first `share` of its layers, at least one."""
    kept = max(1, round(len(config.layers) * share))
    return config.model_copy(update={"layers": config.layers[:kept]})


def hollow(config: DecoderConfig) -> DecoderConfig:
    """As many layers with next to nothing in them: what is left of a token's time is overhead."""
    rope = make_rope("default", 10000.0, {}, head_dim=16)
    attention = Attention(heads=1, kv_heads=1, head_dim=16, rope=rope, scale=0.25)
    layers = tuple(
        layer.model_copy(update={
            "attention": None if layer.attention is None else attention,
            "ffn": None if layer.ffn is None else Dense(hidden=32),
        })
        for layer in config.layers
    )  # fmt: skip
    return config.model_copy(update={"dim": 32, "vocab_size": 64, "layers": layers})


def weight_bits(model: Model) -> float:
    """Bits a weight of most matrices in layers."""
    names = model.config.linear_names()
    if not names:
        return 16.0
    formats = [model.format_of(name) for name in names]
    return float(FORMATS.get(max(set(formats), key=formats.count)).bits)
