"""What all families share: names by table, and a config.json that is written only if it reads back the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from trilemma.core.errors import CheckpointError, UnsupportedModelError
from trilemma.model.config import Attention, DecoderConfig, Rope
from trilemma.model.families import fields
from trilemma.model.families.place import Place

_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"experts\.(\d+)")
_BUFFERS = re.compile(
    r".*\b(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(bias|masked_bias)|attention\.(bias|masked_bias))"
)


class Translation:
    """Base of the families: each says its names by tables and its config.json by two functions.

    outer: canonical module -> Hugging Face's, outside layers; `inner`: the same inside a layer, experts as '{}';
    stem: what stands before `inner`, with '{}' for the layer's index.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    outer: ClassVar[Mapping[str, str]]
    inner: ClassVar[Mapping[str, str]]
    stem: ClassVar[str]
    aliases: ClassVar[tuple[tuple[str, str], ...]] = ()

    def read_config(self, raw: Mapping[str, Any]) -> DecoderConfig:
        raise NotImplementedError

    def written_keys(self, config: DecoderConfig) -> dict[str, Any]:
        """The keys of config.json that say this model's structure; what they can not say is found by reading back."""
        raise NotImplementedError

    def write_config(self, config: DecoderConfig) -> dict[str, Any]:
        if any(layer.attention is None or layer.ffn is None for layer in config.layers) or not config.layers:
            raise self._cannot_write("a layer lacks its attention or its feed-forward block")
        ends = list(config.eos_token_ids)
        written: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "tie_word_embeddings": config.tied,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            **self.written_keys(config),
        }
        try:
            difference = first_difference(self.read_config(written), config)
        except (CheckpointError, UnsupportedModelError) as error:
            raise self._cannot_write(str(error)) from None
        if difference is not None:
            raise self._cannot_write(f"'{difference}' has no equivalent there")
        return written

    def place(self, name: str, config: DecoderConfig) -> Place:
        module, _, leaf = name.rpartition(".")
        if module in self.outer:
            return Place(f"{self.outer[module]}.{leaf}")
        match = _LAYER.fullmatch(name)
        if match is None:
            raise KeyError(name)
        return self.layer_place(int(match[1]), match[2], match[3], config)

    def layer_place(self, index: int, part: str, leaf: str, config: DecoderConfig) -> Place:
        """The place of tensor `part`.`leaf` of a layer."""
        expert = _EXPERT.search(part)
        inner = self.inner[_EXPERT.sub("experts.{}", part)]
        if expert is not None:
            inner = inner.format(expert[1])
        return Place(f"{self.stem.format(index)}.{inner}.{leaf}")

    def is_harmless(self, name: str, config: DecoderConfig) -> bool:
        head = f"{self.outer['head']}.weight"
        return (config.tied and name.endswith(head)) or _BUFFERS.fullmatch(name) is not None

    def _cannot_write(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"This model can not be written as {self.architecture}: {why}. Save it as an artifact instead."
        )


def attentions(config: DecoderConfig) -> list[Attention]:
    """Attention of every layer that has one."""
    return [layer.attention for layer in config.layers if layer.attention is not None]


def check_heads(heads: int, kv_heads: int) -> None:
    """Raise CheckpointError unless query heads can be shared out evenly among KV heads."""
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: 'num_attention_heads' {heads} is no multiple of 'num_key_value_heads' {kv_heads}."
        )


def divided_head_dim(raw: fields.Raw, key: str, dim: int, heads: int) -> int:
    """head_dim where the config has no key for it."""
    if dim % heads:
        raise CheckpointError(f"config.json: '{key}' {dim} is no multiple of the number of heads, {heads}.")
    return dim // heads


def first_difference(found: DecoderConfig, wanted: DecoderConfig) -> str | None:
    """The first field that does not survive; frequency tables count as equal when they are so to f32 accuracy."""
    for key in sorted(DecoderConfig.model_fields):
        if key != "layers" and getattr(found, key) != getattr(wanted, key):
            return key
    if len(found.layers) != len(wanted.layers):
        return "number of layers"
    for index, (ours, theirs) in enumerate(zip(wanted.layers, found.layers, strict=True)):
        if ours.attention is None or theirs.attention is None:
            return f"layer {index}"
        if not _same_rope(theirs.attention.rope, ours.attention.rope):
            return f"rope of layer {index}"
        adapted = theirs.attention.model_copy(update={"rope": ours.attention.rope})
        if ours != theirs.model_copy(update={"attention": adapted}):
            return f"layer {index}"
    return None


def _same_rope(found: Rope | None, wanted: Rope | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    return (
        len(found.inverse_frequencies) == len(wanted.inverse_frequencies)
        and np.allclose(found.inverse_frequencies, wanted.inverse_frequencies, rtol=1e-6, atol=0)
        and abs(found.attention_factor - wanted.attention_factor) <= 1e-6
    )
