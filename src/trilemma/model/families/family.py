"""What a model family is: a translation between one Hugging Face architecture and our DecoderConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from trilemma.model.config import DecoderConfig
from trilemma.model.families.place import Place


class Family(Protocol):
    """Stateless; one instance a family, keyed by Hugging Face's `model_type`.

    `aliases` are other beginnings that the stored names may have in published files: (ours, theirs).
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]  # the class that transformers loads it with
    aliases: ClassVar[tuple[tuple[str, str], ...]]

    def read_config(self, raw: Mapping[str, Any]) -> DecoderConfig:
        """Translate the content of config.json.

        Raises:
            CheckpointError: a key is missing or has a value that makes no sense.
            UnsupportedModelError: an option that we do not run; names key and value.
        """
        ...

    def write_config(self, config: DecoderConfig) -> dict[str, Any]:
        """The config.json of an unquantized checkpoint of this model.

        Raises:
            UnsupportedModelError: the model can not be said in this architecture (layers differ, say).
        """
        ...

    def place(self, name: str, config: DecoderConfig) -> Place:
        """Where Hugging Face keeps a canonical tensor."""
        ...

    def is_harmless(self, name: str, config: DecoderConfig) -> bool:
        """Whether a tensor of the checkpoint that we do not read (Hugging Face's name) carries nothing."""
        ...
