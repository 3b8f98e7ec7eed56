"""What a model costs, by arithmetic alone: parameters, bytes, multiply-accumulates, KV cache.

Nothing here reads a tensor. How many bytes a format takes is the formats' knowledge and is handed
in (`trilemma.formats` lies above this room).
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Literal

from trilemma.core.errors import InputError
from trilemma.core.record import Record
from trilemma.model.config import Attention, DecoderConfig, Dense, Experts
from trilemma.model.model import Model

Role = Literal["embedding", "attention", "ffn", "head", "norms"]
FormatBytes = Callable[[str, tuple[int, int]], int]  # (format name, (out, in)) -> bytes
ROLES: tuple[Role, ...] = ("embedding", "attention", "ffn", "head", "norms")
_LENGTHS = (128, 512, 2048, 8192, 32768, 131072)
_PLAIN_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
_LLAMA_CPP_BLOCKS = {"q8_0": 34, "q4_0": 18}  # bytes of 32 values with their f16 scale


class Inspection(Record):
    """What `trilemma inspect` shows, before any weight is read.

    `kv_bytes` is by precision of the cache and context length; `decode_macs_per_byte` is the
    arithmetic intensity of one decode step: multiply-accumulates over bytes of weights and cache read.
    """

    architecture: str
    family: str
    parameters: int
    active_parameters: int  # that one token uses: all but the experts that it does not choose
    parameters_by_role: dict[str, int]
    dtype: str
    weights_bytes: int
    bytes_by_role: dict[str, int]
    max_context: int
    vocab_size: int
    kv_bytes_per_token: dict[str, int]
    kv_bytes: dict[str, dict[int, int]]
    macs_per_token: dict[int, int]  # by context length
    decode_macs_per_byte: dict[int, float]  # by context length, cache in bf16
    random: bool
    unknown_tensors: tuple[str, ...] = ()


def role_of(name: str) -> Role:
    """The role of a canonical tensor; biases count with their matrix."""
    if name.startswith(("embedding.", "position.")):
        return "embedding"
    if name.startswith("head."):
        return "head"
    if "norm." in name:
        return "norms"
    return "attention" if ".attention." in name else "ffn"


def parameters_by_role(config: DecoderConfig) -> dict[Role, int]:
    """Number of values of each role. A tied head is counted with the embedding, once."""
    counts: dict[Role, int] = dict.fromkeys(ROLES, 0)
    for name, shape in config.tensor_shapes().items():
        counts[role_of(name)] += shape[0] * (shape[1] if len(shape) == 2 else 1)
    return counts


def parameter_count(config: DecoderConfig) -> int:
    """All parameters; a head that shares the embedding counts once, experts count whether active or not."""
    return sum(parameters_by_role(config).values())


def active_parameter_count(config: DecoderConfig) -> int:
    """Parameters that one token uses: all of them, but only the chosen experts of each layer."""
    shapes = config.tensor_shapes()
    return parameter_count(config) - _idle(config, lambda name: shapes[name][0] * shapes[name][1])


def _idle(config: DecoderConfig, size: Callable[[str], int]) -> int:
    """Of the sizes of experts' matrices, those that one token does not choose, when all are chosen equally often."""
    totals: dict[Fraction, int] = {}
    for name, share in expert_shares(config).items():
        totals[share] = totals.get(share, 0) + size(name)
    return sum(int(total * (1 - share)) for share, total in totals.items())


def expert_shares(config: DecoderConfig) -> dict[str, Fraction]:
    """Matrices of experts -> the share of tokens that choose each, when all are chosen equally often."""
    of_layer = [
        Fraction(layer.ffn.active, layer.ffn.count) if isinstance(layer.ffn, Experts) else None
        for layer in config.layers
    ]
    found = {}
    for name in config.linear_names():
        if ".experts." in name:
            share = of_layer[int(name.split(".", 2)[1])]
            assert share is not None
            found[name] = share
    return found


def weights_bytes(
    config: DecoderConfig, format_of: Callable[[str], str], format_bytes: FormatBytes | None = None
) -> int:
    """Bytes of all tensors: matrices in the format that `format_of(name)` says, vectors in f32.

    Args:
        format_bytes: (format, shape) -> bytes; needed for other formats than f32, f16 and bf16.

    Raises:
        InputError: a format whose bytes nobody told.
    """
    return sum(bytes_by_role(config, format_of, format_bytes).values())


def bytes_by_role(
    config: DecoderConfig, format_of: Callable[[str], str], format_bytes: FormatBytes | None = None
) -> dict[Role, int]:
    """`weights_bytes`, role by role."""
    counts: dict[Role, int] = dict.fromkeys(ROLES, 0)
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 2:
            counts[role_of(name)] += _matrix_bytes(format_of(name), (shape[0], shape[1]), format_bytes)
        else:
            counts[role_of(name)] += 4 * shape[0]
    return counts


def kv_bytes_per_token(config: DecoderConfig, kv: str) -> int:
    """Bytes that one position adds to the cache, all layers.

    For each head's key and value int8 has an f32 scale, int4 a scale and a minimum in bf16.

    Raises:
        InputError: an unknown cache policy.
    """
    if kv == "none":
        return 0
    if kv == "int8":
        return sum(2 * spec.kv_heads * (spec.head_dim + 4) for spec in _attentions(config))
    if kv == "int4":
        return sum(2 * spec.kv_heads * (-(-spec.head_dim // 2) + 4) for spec in _attentions(config))
    if kv in _LLAMA_CPP_BLOCKS:
        return sum(2 * spec.kv_heads * spec.head_dim * _LLAMA_CPP_BLOCKS[kv] // 32 for spec in _attentions(config))
    if kv in _PLAIN_BYTES:
        return sum(2 * spec.kv_heads * spec.head_dim * _PLAIN_BYTES[kv] for spec in _attentions(config))
    raise InputError(f"Unknown KV cache '{kv}'. Valid: none, f32, bf16, int8, int4; f16, q8_0 and q4_0 for llama.cpp.")


def kv_bytes(config: DecoderConfig, kv: str, context: int) -> int:
    """Bytes of the cache at a context length. Windows are kept whole: the engine does not drop positions."""
    return context * kv_bytes_per_token(config, kv)


def matrix_macs_per_token(config: DecoderConfig) -> int:
    """Multiply-accumulates of one token in the matrices of all layers and the head; of experts, the active ones."""
    shapes = config.tensor_shapes()

    def size(name: str) -> int:
        return shapes[name][0] * shapes[name][1]

    return sum(map(size, config.linear_names())) - _idle(config, size) + config.vocab_size * config.dim


def attention_macs_per_token(config: DecoderConfig, context: int) -> int:
    """Multiply-accumulates of scores and weighted values, for a token that sees `context` positions."""
    return sum(_attention_macs(layer.attention, context) for layer in config.layers)


def _attention_macs(spec: Attention | None, context: int) -> int:
    if spec is None:
        return 0
    return 2 * spec.heads * spec.head_dim * (context if spec.window is None else min(context, spec.window))


def macs_per_token(config: DecoderConfig, context: int) -> int:
    """All multiply-accumulates of one decode step at a context length."""
    return matrix_macs_per_token(config) + attention_macs_per_token(config, context)


def prompt_rows(config: DecoderConfig, name: str, tokens: int) -> int:
    """Of `tokens` positions computed in one pass, those that a layer's matrix multiplies.

    Only the last position's logits are asked for, so of all others the last layer makes keys and values alone.
    """
    if not name.startswith(f"layers.{len(config.layers) - 1}."):
        return tokens
    return tokens if name.endswith((".attention.k.weight", ".attention.v.weight")) else min(tokens, 1)


def prompt_macs(config: DecoderConfig, tokens: int) -> int:
    """Multiply-accumulates of computing `tokens` positions in one pass for the logits of the last one.

    The last layer and the head see the last token, and of the others what `prompt_rows` says.
    """
    shapes, shares = config.tensor_shapes(), expert_shares(config)

    def unread(name: str) -> int:
        return (tokens - prompt_rows(config, name, tokens)) * int(
            shapes[name][0] * shapes[name][1] * shares.get(name, 1)
        )

    head = config.vocab_size * config.dim
    matrices = tokens * (matrix_macs_per_token(config) - head) + head - sum(map(unread, config.linear_names()))
    return matrices + prompt_attention_macs(config, tokens)


def prompt_attention_macs(config: DecoderConfig, tokens: int) -> int:
    """Scores and weighted values of a whole prompt; in the last layer, of its last token.

    A token sees half of the others on average (all that a window holds, where it is shorter).
    """
    middle = max(1, (tokens + 1) // 2)
    *earlier, last = (layer.attention for layer in config.layers)
    return tokens * sum(_attention_macs(spec, middle) for spec in earlier) + _attention_macs(last, tokens)


def decode_bytes_per_token(
    config: DecoderConfig,
    format_of: Callable[[str], str],
    kv: str,
    context: int,
    format_bytes: FormatBytes | None = None,
) -> int:
    """Bytes that one decode step reads: every matrix that is multiplied, one row of a table, the cache.

    Of experts, only the active ones are read; where experts are stored differently, their mean counts.
    """
    shapes = config.tensor_shapes()
    total = sum(bytes_by_role(config, format_of, format_bytes).values())
    tables = {} if config.tied else {"embedding.weight": config.vocab_size}
    if config.learned_positions:
        tables["position.weight"] = config.max_context

    def size(name: str) -> int:
        return _matrix_bytes(format_of(name), (shapes[name][0], shapes[name][1]), format_bytes)

    total -= sum(size(name) - size(name) // rows for name, rows in tables.items())
    return total - _idle(config, size) + kv_bytes(config, kv, context)


def inspect_model(
    model: Model, *, contexts: tuple[int, ...] | None = None, format_bytes: FormatBytes | None = None
) -> Inspection:
    """Everything that can be said of a model without reading its weights.

    Args:
        contexts: lengths to state figures at; by default powers of 4 from 128 and the model's own.
        format_bytes: (format, shape) -> bytes, for packed matrices; by default one of each kind is opened and asked.
    """
    config = model.config
    lengths = contexts or (*(n for n in _LENGTHS if n < config.max_context), config.max_context)
    format_bytes = format_bytes or _stored_bytes(model)
    by_role = bytes_by_role(config, model.format_of, format_bytes)
    reads = {n: decode_bytes_per_token(config, model.format_of, "bf16", n, format_bytes) for n in lengths}
    policies = ("f32", "bf16", "int8", "int4")
    return Inspection(
        architecture=describe(config),
        family=config.family,
        parameters=parameter_count(config),
        active_parameters=active_parameter_count(config),
        parameters_by_role={str(role): count for role, count in parameters_by_role(config).items()},
        dtype=_dtypes(model),
        weights_bytes=sum(by_role.values()),
        bytes_by_role={str(role): count for role, count in by_role.items()},
        max_context=config.max_context,
        vocab_size=config.vocab_size,
        kv_bytes_per_token={kv: kv_bytes_per_token(config, kv) for kv in policies},
        kv_bytes={kv: {n: kv_bytes(config, kv, n) for n in lengths} for kv in policies},
        macs_per_token={n: macs_per_token(config, n) for n in lengths},
        decode_macs_per_byte={n: macs_per_token(config, n) / reads[n] for n in lengths},
        random=bool(getattr(model.source, "random", False)),
        unknown_tensors=tuple(getattr(model.source, "unknown", ())),
    )


def describe(config: DecoderConfig) -> str:
    """One line: 'llama, 6 layers x 256, 8 heads (4 KV) x 32, ffn 768, vocabulary 8192, tied'."""
    heads = {(a.heads, a.kv_heads, a.head_dim) for a in _attentions(config)}
    hidden = dict.fromkeys(_describe_ffn(layer.ffn) for layer in config.layers if layer.ffn is not None)
    windows = {a.window for a in _attentions(config)} - {None}
    parts = [
        config.family,
        f"{len(config.layers)} layers x {config.dim}",
        " / ".join(f"{h} heads ({k} KV) x {d}" for h, k, d in sorted(heads)),
        "ffn " + " / ".join(hidden) if hidden else "no ffn",
        f"vocabulary {config.vocab_size}",
        "tied" if config.tied else "untied",
    ]
    if windows:
        parts.append("window " + " / ".join(map(str, sorted(w for w in windows if w is not None))))
    return ", ".join(part for part in parts if part)


def _describe_ffn(ffn: Dense | Experts) -> str:
    if isinstance(ffn, Dense):
        return str(ffn.hidden)
    shared = f" + {ffn.shared_hidden} shared" if ffn.shared_hidden else ""
    return f"{ffn.active} of {ffn.count} experts x {ffn.hidden}{shared}"


def _attentions(config: DecoderConfig) -> list[Attention]:
    return [layer.attention for layer in config.layers if layer.attention is not None]


def _matrix_bytes(format_name: str, shape: tuple[int, int], format_bytes: FormatBytes | None) -> int:
    if format_name in _PLAIN_BYTES:
        return shape[0] * shape[1] * _PLAIN_BYTES[format_name]
    if format_bytes is None:
        raise InputError(f"The bytes of format '{format_name}' are not known here; hand in format_bytes.")
    return format_bytes(format_name, shape)


def _stored_bytes(model: Model) -> FormatBytes:
    """Bytes of a packed format, learned from one stored matrix of that format and shape."""
    example = {
        (model.format_of(name), shape): name for name, shape in model.config.tensor_shapes().items() if len(shape) == 2
    }
    return lambda format_name, shape: model.stored(example[(format_name, shape)]).nbytes


def _dtypes(model: Model) -> str:
    """The formats of the matrices, the most frequent first: 'bf16', or 'int4-g32, bf16'."""
    counts: dict[str, int] = {}
    for name, shape in model.config.tensor_shapes().items():
        if len(shape) == 2:
            counts[model.format_of(name)] = counts.get(model.format_of(name), 0) + shape[0] * shape[1]
    return ", ".join(sorted(counts, key=lambda key: -counts[key]))
