"""Random models of stated shapes, opened in the native engine: what profiles, checks and benchmarks run."""

from __future__ import annotations

from dataclasses import dataclass

from trilemma.formats.random_weights import with_random_weights
from trilemma.model.config import Attention, DecoderConfig, Dense, LayerSpec
from trilemma.model.model import Activation, Model, RunSettings
from trilemma.model.rope import make_rope
from trilemma.model.sources import RandomSource
from trilemma.runtime.engine import EngineOptions, KvCache
from trilemma.runtime.native import NativeEngine


@dataclass(frozen=True)
class Shape:
    """A model's shapes; heads 0 leaves attention out, hidden 0 the feed-forward block."""

    layers: int
    dim: int
    hidden: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 64
    vocab: int = 64
    context: int = 256

    def config(self) -> DecoderConfig:
        attention = None
        if self.heads:
            attention = Attention(
                heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, scale=self.head_dim**-0.5,
                rope=make_rope("default", 10000.0, {}, head_dim=self.head_dim),
            )  # fmt: skip
        ffn = Dense(hidden=self.hidden) if self.hidden else None
        return DecoderConfig(
            family="llama", dim=self.dim, vocab_size=self.vocab, max_context=self.context, norm_eps=1e-5, tied=True,
            layers=(LayerSpec(attention=attention, ffn=ffn),) * self.layers,
        )  # fmt: skip


def random_model(config: DecoderConfig, inner: str, outer: str, activation: Activation, kv: KvCache = "bf16") -> Model:
    """Random weights: `inner` is the format of matrices inside layers, `outer` of embedding and head."""
    model = Model(config, RandomSource(config), run=RunSettings(kv_cache=kv))

    def format_of(name: str) -> str:
        return inner if name.startswith("layers.") else outer

    return with_random_weights(model, format_of, activation_of=lambda name: activation)


def open_shape(shape: Shape, threads: int, kv: KvCache = "bf16") -> NativeEngine:
    """A model in f32, whose products need no preparation of their inputs."""
    engine = NativeEngine(random_model(shape.config(), "f32", "f32", "f32", kv), EngineOptions(threads=threads))
    engine.settle()
    return engine
