"""The torch decoder against transformers, through the whole loading path."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from trilemma.model.checkpoint import read_checkpoint, write_checkpoint
from trilemma.model.decoder import Decoder, canonical_tensors, decoder_to_model, layer_from_model

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-4  # largest difference of f32 logits; they are of the order of 10

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
    "one kv head": {"num_key_value_heads": 1},
    "as many kv heads": {"num_key_value_heads": 4},
    "head_dim 16 where dim/heads is 10": {"head_dim": 16},
    "head_dim 6": {"head_dim": 6},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True, "attention_bias": True},
    "theta": {"rope_theta": 500000.0, "rms_norm_eps": 1e-3},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3": {
        "head_dim": 32,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 48,
        },
    },
    "yarn": {"head_dim": 32, "rope_scaling": _YARN},
    "yarn with mscale": {"rope_scaling": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}},
}  # fmt: skip
QWEN2: dict[str, dict[str, Any]] = {
    "untied": {"tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
    "window unused": {"sliding_window": 5, "use_sliding_window": False},
    "window in upper layers": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
    "window by layer types": {
        "sliding_window": 7, "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}  # fmt: skip
MISTRAL: dict[str, dict[str, Any]] = {
    "window shorter than the text": {"sliding_window": 9},
    "no window": {"sliding_window": None},
    "head_dim": {"head_dim": 8, "sliding_window": 4},
}
CASES = [
    pytest.param(kind, options, id=f"{kind}: {name}")
    for kind, table in (("Llama", LLAMA), ("Qwen2", QWEN2), ("Mistral", MISTRAL))
    for name, options in table.items()
]


def _logits(decoder: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = decoder(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits


def _tokens(config: Any, generator: np.random.Generator, time: int = 41) -> torch.Tensor:
    return torch.from_numpy(generator.integers(0, config.vocab_size, (2, time)))


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_equals_transformers(kind, options, save_hf, sizes, random_generator):
    theirs, folder = save_hf(kind, **{**sizes, **options})
    ours = Decoder.from_model(read_checkpoint(folder))
    tokens = _tokens(ours.config, random_generator)
    expected = _logits(theirs, tokens)
    assert expected.std() > 0.5  # else equality would say little
    assert (_logits(ours, tokens) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_equals_transformers_from_shards_of_bf16(kind, save_hf, sizes, random_generator):
    import transformers

    _, folder = save_hf(kind, dtype=torch.bfloat16, shard="20KB", **sizes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = read_checkpoint(folder)
    assert model.format_of("layers.1.ffn.down.weight") == "bf16"
    tokens = _tokens(model.config, random_generator)
    assert (_logits(Decoder.from_model(model), tokens) - _logits(theirs, tokens)).abs().max() < TOLERANCE


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_written_checkpoint_loads_in_transformers(kind, options, save_hf, sizes, random_generator, tmp_path):
    import transformers

    theirs, folder = save_hf(kind, **{**sizes, **options})
    model = read_checkpoint(folder)
    written = write_checkpoint(model, tmp_path / "written")
    again = transformers.AutoModelForCausalLM.from_pretrained(written).eval()
    tokens = _tokens(model.config, random_generator)
    assert torch.equal(_logits(again, tokens), _logits(theirs, tokens))
    assert read_checkpoint(written).config == model.config


def test_layers_one_by_one_equal_the_whole(tiny_model, random_generator):
    model = tiny_model(seed=5, layers=3, tied=False)
    decoder = Decoder.from_model(model)
    tokens = _tokens(model.config, random_generator, 17)
    with torch.no_grad():
        x = decoder.embedding(tokens)
        for index in range(3):
            x = layer_from_model(model, index)(x)
        assert torch.equal(decoder.logits(x), decoder(tokens))


def test_state_has_the_canonical_names(tiny_model):
    for options in ({"tied": True}, {"tied": False}, {"qkv_bias": True}):
        model = tiny_model(**options)
        decoder = Decoder.from_model(model)
        shapes = {name: tuple(value.shape) for name, value in decoder.state_dict().items()}
        assert shapes == model.config.tensor_shapes()
        for name, values in canonical_tensors(decoder):
            np.testing.assert_array_equal(values, model.tensor(name))


def test_layers_without_a_part(tiny_model):
    model = tiny_model(layers=3)
    config = model.config
    layers = (
        config.layers[0].model_copy(update={"attention": None}),
        config.layers[1].model_copy(update={"ffn": None}),
        config.layers[2],
    )
    changed = model.with_config(config.model_copy(update={"layers": layers}))
    decoder = Decoder.from_model(changed)
    assert decoder.layers[0].attention is None
    assert "layers.1.ffn.up.weight" not in decoder.state_dict()
    assert torch.isfinite(_logits(decoder, torch.tensor([[1, 2, 3]]))).all()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_back_to_a_model(tiny_model, dtype, tmp_path):
    model = tiny_model(seed=2)
    back = decoder_to_model(Decoder.from_model(model), dtype)
    assert back.format_of("layers.0.attention.q.weight") == dtype
    tolerance = 0 if dtype == "f32" else 2**-8
    for name in model:
        np.testing.assert_allclose(back.tensor(name), model.tensor(name), rtol=tolerance)
    again = read_checkpoint(write_checkpoint(back, tmp_path / "out"))
    for name in model:
        if len(model.config.tensor_shapes()[name]) == 2:
            np.testing.assert_array_equal(again.tensor(name), back.tensor(name))


def test_gradient_checkpointing_changes_no_gradient(tiny_model):
    model = tiny_model(seed=1)
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    gradients = []
    for checkpointing in (False, True):
        decoder = Decoder.from_model(model, gradient_checkpointing=checkpointing).train()
        decoder(tokens).logsumexp(-1).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in decoder.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_initialisation_is_seeded_and_finite(tiny_model):
    config = tiny_model().config
    first, second, other = (Decoder(config) for _ in range(3))
    first.initialize(seed=4)
    second.initialize(seed=4)
    other.initialize(seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    assert 0.015 < float(first.embedding.weight.detach().std()) < 0.025


@pytest.mark.shared
def test_stories_golden(shared_dir):
    from trilemma.model.tokenizer import Tokenizer

    folder = shared_dir / "models" / "stories260K"
    tokenizer, decoder = Tokenizer.load(folder), Decoder.from_model(read_checkpoint(folder))
    ids = tokenizer.encode("Once upon a time")
    for _ in range(28):
        ids.append(int(_logits(decoder, torch.tensor([ids]))[0, -1].argmax()))
    expected = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    assert tokenizer.decode(ids).startswith(expected)


def _nats(decoder: Decoder, ids: list[int]) -> tuple[float, int]:
    tokens = torch.tensor([ids])
    losses = torch.nn.functional.cross_entropy(_logits(decoder, tokens[:, :-1])[0], tokens[0, 1:], reduction="sum")
    return float(losses), len(ids) - 1


@pytest.mark.shared
def test_stories_published_perplexity(shared_dir):
    import json

    from trilemma.model.tokenizer import Tokenizer

    folder = shared_dir / "models" / "stories260K"
    tokenizer, decoder = Tokenizer.load(folder), Decoder.from_model(read_checkpoint(folder))
    documents = json.loads((shared_dir / "data/text/tinystories_1000.json").read_text())[500:700]
    texts = [d if isinstance(d, str) else d["text"] for d in documents]
    sums = [_nats(decoder, tokenizer.encode(text.replace("\n\n", "\n"))[:512]) for text in texts]
    nats = sum(s for s, _ in sums) / sum(n for _, n in sums)
    assert nats == pytest.approx(1.507, abs=0.0006)


@pytest.mark.shared
def test_hearth_published_perplexity(shared_dir, hearth_path):
    from trilemma.model.tokenizer import Tokenizer

    tokenizer, decoder = Tokenizer.load(hearth_path), Decoder.from_model(read_checkpoint(hearth_path))
    text = (shared_dir / "data/text/books-kids-valid.txt").read_text(encoding="utf-8")[:400_000]
    paragraphs = (" ".join(paragraph.split("\n")) for paragraph in re.split(r"\n{2,}", text))
    ids = tokenizer.encode_plain("\n".join(paragraphs).replace("_", ""))  # the form that it was trained on
    sums = [_nats(decoder, ids[start : start + 512]) for start in range(0, 60 * 512, 512)]
    nats = sum(s for s, _ in sums) / sum(n for _, n in sums)
    assert np.exp(nats) == pytest.approx(44.91, abs=0.006)
