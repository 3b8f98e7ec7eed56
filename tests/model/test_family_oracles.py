"""Every family against transformers: read from what it saves, cached and not, and written back for it to load."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from family_cases import BASE, CASES
from trilemma.model.checkpoint import read_checkpoint, write_checkpoint
from trilemma.model.decoder import Decoder

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-4  # largest difference of f32 logits; they are of the order of 10


class Slot:
    """A cache without rounding."""

    def __init__(self) -> None:
        self.kept: tuple[torch.Tensor, ...] = ()

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        new = (keys, values)
        self.kept = tuple(torch.cat(pair, dim=2) for pair in zip(self.kept, new, strict=True)) if self.kept else new
        return self.kept[0], self.kept[1]


def _logits(decoder: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = decoder(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits


def _tokens(vocab: int, generator: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(generator.integers(0, vocab, (2, 41)))


def _in_pieces(decoder: Decoder, tokens: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    slots, out, start = [Slot() for _ in decoder.layers], [], 0
    with torch.no_grad():
        for size in sizes:
            out.append(decoder(tokens[:, start : start + size], start=start, slots=slots))
            start += size
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_written_checkpoint(case, save_hf, random_generator, tmp_path):
    import transformers

    kind, options = CASES[case]
    theirs, folder = save_hf(kind, **options)
    model = read_checkpoint(folder)
    assert not model.source.unknown
    ours, tokens = Decoder.from_model(model), _tokens(model.config.vocab_size, random_generator)
    assert {n: tuple(v.shape) for n, v in ours.state_dict().items()} == model.config.tensor_shapes()
    expected = _logits(theirs, tokens)
    assert expected.std() > 0.5  # else equality would say little
    assert (_logits(ours, tokens) - expected).abs().max() < TOLERANCE
    assert (_in_pieces(ours, tokens, (17, 1, 5, 1, 1, 16)) - expected).abs().max() < TOLERANCE
    written = write_checkpoint(model, tmp_path / "written")
    again = transformers.AutoModelForCausalLM.from_pretrained(written, experts_implementation="eager").eval()
    assert type(again) is type(theirs)
    assert (_logits(again, tokens) - expected).abs().max() < (2e-5 if "gemma" in case else 1e-12)
    back = read_checkpoint(written)
    assert back.config == model.config
    for name in model:
        np.testing.assert_allclose(back.tensor(name), model.tensor(name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["gemma3", "phi3", "gpt2", "gpt_neox", "mixtral"])
def test_bf16_survives_reading_and_writing(case, save_hf, tmp_path):
    kind, options = CASES[case]
    _, folder = save_hf(kind, dtype=torch.bfloat16, **options)
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "model.safetensors")
    for values in held.values():
        if values.ndim == 1:
            values[0] = 1.1e-7  # 1 + this, as Gemma's norms mean it, is not exact in f32
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    model = read_checkpoint(folder)
    written = write_checkpoint(model, tmp_path / "written")

    before, after = load_file(folder / "model.safetensors"), load_file(written / "model.safetensors")
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name], values), name


def test_gemma3_with_a_vision_tower(save_hf, random_generator, tmp_path):
    import transformers

    _, folder = save_hf("Gemma3Text", **CASES["gemma3"][1])
    text = dict(CASES["gemma3"][1])
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    part = transformers.Gemma3ForCausalLM.from_pretrained(folder).eval()
    whole.model.language_model.load_state_dict(part.model.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    model = read_checkpoint(tmp_path / "whole")
    assert (model.config.family, model.source.unknown) == ("gemma3_text", ())
    tokens = _tokens(model.config.vocab_size, random_generator)
    assert (_logits(Decoder.from_model(model), tokens) - _logits(part, tokens)).abs().max() < TOLERANCE


def test_gpt2_files_without_the_prefix(save_hf, random_generator):
    from safetensors.torch import load_file, save_file

    theirs, folder = save_hf("GPT2", **CASES["gpt2"][1])
    path = folder / "model.safetensors"
    bare = {name.removeprefix("transformer."): values for name, values in load_file(path).items()}
    save_file({**bare, "h.0.attn.bias": torch.ones(1, 1, 64, 64)}, path)
    model = read_checkpoint(folder)
    assert not model.source.unknown
    tokens = _tokens(model.config.vocab_size, random_generator)
    assert (_logits(Decoder.from_model(model), tokens) - _logits(theirs, tokens)).abs().max() < TOLERANCE


def test_long_rope_ends_at_the_original_context(save_hf):
    _, folder = save_hf("Phi3", **CASES["phi3 long rope"][1])
    config = read_checkpoint(folder).config
    assert config.max_context == 48
    rope = config.layers[0].attention.rope
    assert rope.attention_factor > 1
    assert rope.parameters["long_factor.4"] == 9.0
    assert BASE["max_position_embeddings"] == 64
