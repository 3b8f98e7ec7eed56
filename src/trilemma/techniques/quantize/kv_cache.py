"""The precision in which keys and values are kept while text is made."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from trilemma.model.config import DecoderConfig
from trilemma.model.model import Model
from trilemma.techniques.technique import Build, TechniqueSettings


class KvCacheSettings(TechniqueSettings):
    """Settings of `kv-cache`."""

    precision: Literal["none", "f32", "bf16", "int8", "int4"] = Field(
        "int8", description="f32, bf16, int8 or int4; none keeps no cache and recomputes every position"
    )


class KvCache:
    """Choose the KV cache's precision."""

    name: ClassVar[str] = "kv-cache"
    what: ClassVar[str] = "keep keys and values in f32, bf16, int8 or int4, or not at all"
    Settings: ClassVar[type[KvCacheSettings]] = KvCacheSettings

    def supports(self, config: DecoderConfig) -> str | None:
        if all(layer.attention is None for layer in config.layers):
            return "the model has no attention layers"
        return None

    def needs_calibration(self, settings: KvCacheSettings) -> bool:
        return False

    def apply(self, model: Model, settings: KvCacheSettings, build: Build) -> Model:
        return model.with_run(model.run.model_copy(update={"kv_cache": settings.precision}))
