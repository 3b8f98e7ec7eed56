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
        ("qwen3", {"rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
        ("qwen3", {"mlp_bias": True}, "'mlp_bias' is True"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "'final_logit_softcapping' is 30.0"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' is 50.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True"),
        ("gemma3_text", {"hidden_activation": "quick_gelu"}, "'hidden_activation' is 'quick_gelu'"),
        ("gemma3_text", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ("phi3", {"rope_scaling": {"type": "llama3"}}, "rope type 'llama3'"),
        ("phi3", {"attention_bias": True}, "'attention_bias' is True"),
        ("mixtral", {"hidden_act": "gelu", "num_local_experts": 4, "num_experts_per_tok": 2}, "'hidden_act' is 'gelu'"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "'shared_expert_intermediate_size' is 64"),
        ("gpt_neox", {"hidden_act": "quick_gelu"}, "'hidden_act' is 'quick_gelu'"),
        ("gpt2", {"add_cross_attention": True}, "'add_cross_attention' is True"),
        ("gpt2", {"activation_function": "mish"}, "'activation_function' is 'mish'"),
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


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 3}, "'num_experts_per_tok' is 3, but there are 2"),
        ("mixtral", {"num_experts_per_tok": 3}, "lacks 'num_local_experts'"),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2}, "lacks 'moe_intermediate_size'"),
        ("gpt2", {}, "lacks 'n_embd'"),
        ("gpt_neox", {"rotary_pct": 0.4}, "0.4 of a head's 8 dimensions rotate, that is 3"),
        ("gpt_neox", {"num_attention_heads": 5}, "'hidden_size' 32 is no multiple of the number of heads, 5"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "needs 'long_factor'"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}}, "a list of 4 numbers"),
        ("gemma3", {}, "lacks 'text_config'"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "'layer_types' must list 4 layers"),
    ],
)
def test_senseless_options_of_families_are_refused(kind, changes, words):
    with pytest.raises(CheckpointError, match=words):
        _read(kind, **changes)


def test_gemma3_patterns_and_the_hubs_spelling_of_rope():
    changes = {"num_hidden_layers": 7, "sliding_window": 9, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
               "rope_theta": 5e5, "rope_local_base_freq": 2e4, "head_dim": 8}  # fmt: skip
    config = _read("gemma3_text", **changes)
    assert _windows(config) == [9] * 5 + [None, 9]
    assert _windows(_read("gemma3_text", **changes, sliding_window_pattern=2))[:2] == [9, None]
    ropes = [layer.attention.rope for layer in config.layers]
    assert {(rope.theta, rope.kind) for rope in ropes[:5]} == {(2e4, "default")}
    assert (ropes[5].theta, ropes[5].kind) == (5e5, "linear")
    assert config.tied


def test_sparse_steps_of_qwen3_moe():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

    def kinds(**changes: Any) -> list[str]:
        return [layer.ffn.kind for layer in _read("qwen3_moe", **experts, **changes).layers]

    assert kinds() == ["experts"] * 4
    assert kinds(decoder_sparse_step=2) == ["dense", "experts"] * 2
    assert kinds(decoder_sparse_step=2, mlp_only_layers=[3]) == ["dense", "experts", "dense", "dense"]


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
