"""config.json to DecoderConfig: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trilemma.core.errors import CheckpointError, UnsupportedModelError
from trilemma.model.config import Rope
from trilemma.model.families import FAMILIES, family_of

BASE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
}  # fmt: skip


def _read(kind: str, **changes: Any) -> Any:
    raw = {**BASE, "model_type": kind, **changes}
    return family_of(raw).read_config({key: value for key, value in raw.items() if value is not ...})


def _windows(config: Any) -> list[int | None]:
    return [layer.attention.window for layer in config.layers]


def test_published_configs(shapes_path):
    found = {
        path.parent.name: family_of(raw).read_config(raw)
        for path in shapes_path.glob("*/config.json")
        for raw in [json.loads(path.read_text())]
    }
    qwen, llama = found["Qwen2.5-0.5B"], found["Llama-3.2-1B"]
    assert (len(qwen.layers), qwen.dim, qwen.tied, qwen.layers[0].attention.qkv_bias) == (24, 896, True, True)
    assert _windows(qwen) == [None] * 24  # sliding_window is there but not in use
    assert (llama.layers[0].attention.head_dim, llama.layers[0].attention.rope.kind) == (64, "llama3")
    assert llama.max_context == 131072


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'.*'silu'"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "'quantization_config'.*gptq.*unquantized"),
        ("llama", {"sliding_window": 16}, "'sliding_window' is 16"),
        ("mistral", {"attention_bias": True}, "'attention_bias' is True"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "full_attention"),
        ("qwen2", {"layer_types": ["linear_attention"] * 4}, "linear_attention"),
        ("qwen2", {"rope_scaling": {"type": "mrope"}}, "rope type 'mrope'"),
    ],
)
def test_what_we_do_not_run_is_refused(kind, changes, words):
    with pytest.raises(UnsupportedModelError, match=words):
        _read(kind, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": ...}, "lacks 'hidden_size'"),
        ({"hidden_size": "32"}, "'hidden_size' is '32'"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' is 0"),
        ({"vocab_size": True}, "'vocab_size' is True"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' is nan"),
        ({"tie_word_embeddings": "yes"}, "'tie_word_embeddings' is 'yes'"),
        ({"num_key_value_heads": 3}, "no multiple of 'num_key_value_heads' 3"),
        ({"hidden_size": 30}, "'head_dim' is not given"),
        ({"head_dim": 7}, "even"),
        ({"eos_token_id": "2"}, "'eos_token_id' is '2'"),
    ],
)
def test_senseless_values_are_refused(changes, words):
    with pytest.raises(CheckpointError, match=words):
        _read("llama", **changes)


def test_unknown_architecture_lists_the_valid_ones():
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*llama, mistral.*qwen2"):
        family_of({"model_type": "mamba"})
    with pytest.raises(CheckpointError, match="model_type"):
        family_of({})


@pytest.mark.parametrize(
    ("kind", "changes", "windows"),
    [
        ("mistral", {}, [4096] * 4),
        ("mistral", {"sliding_window": None}, [None] * 4),
        ("mistral", {"sliding_window": 7}, [7] * 4),
        ("qwen2", {"sliding_window": 7}, [None] * 4),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True}, [None] * 4),  # from layer 28 up
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 3}, [None, None, None, 7]),
        ("qwen2", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, [None] * 4),
    ],
)
def test_windows_as_transformers_reads_them(kind, changes, windows):
    assert _windows(_read(kind, **changes)) == windows


def test_end_tokens_outside_the_vocabulary_can_not_occur():
    config = _read("llama", eos_token_id=[2, 63, 64, -1], bos_token_id=99)
    assert config.eos_token_ids == (2, 63)
    assert config.bos_token_id is None


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_names_are_unique_and_known_to_transformers(kind):
    import torch
    import transformers

    config = _read(kind, tie_word_embeddings=False)
    family = FAMILIES.get(kind)
    names = {family.place(name, config).name: shape for name, shape in config.tensor_shapes().items()}
    with torch.device("meta"):
        theirs = getattr(transformers, family.architecture)(
            getattr(transformers, family.architecture.replace("ForCausalLM", "Config"))(**family.write_config(config))
        )
    assert names == {name: tuple(value.shape) for name, value in theirs.state_dict().items()}


def test_models_that_no_config_json_can_say():
    config = _read("llama")
    first = config.layers[0]
    narrow = first.model_copy(update={"ffn": first.ffn.model_copy(update={"hidden": 16})})
    bare = first.model_copy(update={"attention": None})
    odd_rope = Rope(theta=10000.0, inverse_frequencies=(1.0, 0.5, 0.25, 0.1))
    turned = first.model_copy(update={"attention": first.attention.model_copy(update={"rope": odd_rope})})
    for layers in ((first, narrow), (bare, first), (first, bare), (turned, turned)):
        with pytest.raises(UnsupportedModelError, match="can not be written as LlamaForCausalLM"):
            FAMILIES.get("llama").write_config(config.model_copy(update={"layers": layers}))
