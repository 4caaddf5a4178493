"""What the native runner reads from a Hugging Face ``config.json``.

Parsed here and not by transformers, whose import takes seconds; keys that a config leaves out get
the defaults of its model type there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pageframe.core.errors import InvalidRequestError, UnimplementedError
from pageframe.executor.model.rope import ROPE_TYPES

JsonObject = Mapping[str, Any]

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "max_position_embeddings": 4096 * 32,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}
FALCON = "falcon"
NATIVE_MODEL_TYPES = (*_DEFAULTS, FALCON)

# Falcon's defaults, as above.
_FALCON_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "multi_query": True,
    "parallel_attn": True,
    "tie_word_embeddings": True,
}


class Family(Enum):
    """Whose names a checkpoint's tensors have, and how its layers are built."""

    LLAMA = "llama"
    FALCON = "falcon"


class NormKind(Enum):
    """How channels are normalised before a layer's halves."""

    ROOT_MEAN_SQUARE = "rms"
    CENTRED = "layer"


class Activation(Enum):
    """What is between the two products of the feed-forward part."""

    GATED_SILU = "silu"
    GELU = "gelu"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Sizes and constants of a model, and what it does in which order.

    Llama's way is the default of what follows ``windows``.

    Attributes:
        vocab_size: Rows of the embedding.
        hidden_size: Channels between layers.
        intermediate_size: Channels inside the feed-forward part.
        num_layers: Layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Channels per head.
        norm_epsilon: Added to the mean square, or to the variance, in norms.
        max_model_len: Positions the model was made for.
        is_tied: The output head is the embedding.
        has_qk_norm: Query and key heads are normalised (Qwen3).
        rope_type: See ``rope.ROPE_TYPES``.
        rope_parameters: ``rope_theta`` and what the type needs.
        windows: Per layer, positions that a token sees; None for all.
        family: Whose tensors they are.
        norm: Kind of all norms.
        activation: Of the feed-forward part.
        is_parallel: Both halves of a layer read what came into it, and are added to it at once.
        has_feed_forward_norm: The feed-forward part has a norm of its own; else it reads what
            attention reads.
        has_alibi: Scores fall with distance, and no head is rotated.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_epsilon: float
    max_model_len: int
    is_tied: bool
    has_qk_norm: bool
    rope_type: str
    rope_parameters: Mapping[str, float]
    windows: tuple[int | None, ...]
    family: Family = Family.LLAMA
    norm: NormKind = NormKind.ROOT_MEAN_SQUARE
    activation: Activation = Activation.GATED_SILU
    is_parallel: bool = False
    has_feed_forward_norm: bool = True
    has_alibi: bool = False


def parse_decoder_config(config: JsonObject) -> DecoderConfig:
    """Read a ``config.json``.

    Raises:
        UnimplementedError: reason MODEL_NOT_NATIVE; another runner may take the model.
        InvalidRequestError: reason MODEL_CONFIG_INVALID; a key is missing or has no sense.
    """
    if config.get("model_type") == FALCON:
        return _parse_falcon(config)
    return _parse_llama(config)


def _parse_llama(config: JsonObject) -> DecoderConfig:
    model_type = str(config.get("model_type"))
    if model_type not in _DEFAULTS:
        raise _not_native(f"model type {model_type!r} is none of {', '.join(NATIVE_MODEL_TYPES)}")
    merged = {**_DEFAULTS[model_type], **config}
    if merged.get("hidden_act", "silu") != "silu":
        raise _not_native(f"activation {merged['hidden_act']!r} is not 'silu'")
    num_layers = _size(merged, "num_hidden_layers")
    num_heads = _size(merged, "num_attention_heads")
    hidden_size = _size(merged, "hidden_size")
    rope_type, rope_parameters = _rope(merged)
    return DecoderConfig(
        vocab_size=_size(merged, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(merged, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=merged.get("num_key_value_heads") or num_heads,
        head_dim=merged.get("head_dim") or hidden_size // num_heads,
        norm_epsilon=float(merged.get("rms_norm_eps", 1e-6)),
        max_model_len=_size(merged, "max_position_embeddings"),
        is_tied=bool(merged.get("tie_word_embeddings", False)),
        has_qk_norm=model_type == "qwen3",
        rope_type=rope_type,
        rope_parameters=rope_parameters,
        windows=_windows(model_type, merged, num_layers),
    )


def _parse_falcon(config: JsonObject) -> DecoderConfig:
    """Falcon's three designs: with rotary heads, with ALiBi, and the "new" one of 40B and 11B."""
    merged = {**_FALCON_DEFAULTS, **config}
    if merged.get("activation", "gelu") != "gelu":
        raise _not_native(f"activation {merged['activation']!r} is not 'gelu'")
    num_layers = _size(merged, "num_hidden_layers")
    num_heads = _size(merged, "num_attention_heads")
    hidden_size = _size(merged, "hidden_size")
    if hidden_size % num_heads:
        raise InvalidRequestError(
            "MODEL_CONFIG_INVALID",
            f"config.json says hidden_size = {hidden_size}, which {num_heads} heads cannot share",
            field="hidden_size",
            value=hidden_size,
        )
    is_new = bool(merged.get("new_decoder_architecture"))
    is_parallel = is_new or bool(merged["parallel_attn"])
    # A head of keys for all, for some, or for each: the same layout with other numbers.
    shared_heads = 1 if merged["multi_query"] else num_heads
    num_norms = merged.get("num_ln_in_parallel_attn") or 2
    rope_type, rope_parameters = _rope(merged)
    return DecoderConfig(
        vocab_size=_size(merged, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=merged.get("ffn_hidden_size") or 4 * hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=(merged.get("num_kv_heads") or num_heads) if is_new else shared_heads,
        head_dim=hidden_size // num_heads,
        norm_epsilon=float(merged.get("layer_norm_epsilon", 1e-5)),
        max_model_len=_size(merged, "max_position_embeddings"),
        is_tied=bool(merged["tie_word_embeddings"]),
        has_qk_norm=False,
        rope_type=rope_type,
        rope_parameters=rope_parameters,
        windows=(None,) * num_layers,
        family=Family.FALCON,
        norm=NormKind.CENTRED,
        activation=Activation.GELU,
        is_parallel=is_parallel,
        has_feed_forward_norm=not is_parallel or (is_new and num_norms == 2),
        has_alibi=bool(merged.get("alibi")),
    )


def _rope(config: JsonObject) -> tuple[str, dict[str, float]]:
    """Type and numbers, from ``rope_parameters`` or the older ``rope_theta``/``rope_scaling``."""
    found: JsonObject = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in found.values()):
        per_layer_type = list(found.values())
        if any(entry != per_layer_type[0] for entry in per_layer_type):
            raise _not_native("layers differ in their rotary embedding")
        found = per_layer_type[0]
    rope_type = str(found.get("rope_type") or found.get("type") or "default")
    if rope_type not in ROPE_TYPES:
        raise _not_native(f"rope type {rope_type!r} is none of {', '.join(ROPE_TYPES)}")
    if found.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise _not_native("only a part of each head is rotated")
    numbers = {
        key: float(value)
        for key, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    numbers.setdefault("rope_theta", float(config.get("rope_theta", 10000.0)))
    if rope_type == "llama3":
        numbers.setdefault(
            "original_max_position_embeddings", float(config["max_position_embeddings"])
        )
    return rope_type, numbers


def _windows(model_type: str, config: JsonObject, num_layers: int) -> tuple[int | None, ...]:
    window: int | None = config.get("sliding_window")
    if model_type == "llama" or window is None:
        return (None,) * num_layers
    if model_type == "mistral":
        return (window,) * num_layers
    if not config.get("use_sliding_window", False):
        return (None,) * num_layers
    layer_types = config.get("layer_types") or [
        "sliding_attention" if index >= config["max_window_layers"] else "full_attention"
        for index in range(num_layers)
    ]
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _size(config: JsonObject, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise InvalidRequestError(
            "MODEL_CONFIG_INVALID",
            f"config.json says {key} = {value!r}; it must be a whole number from 1 up",
            field=key,
            value=value,
        )
    return value


def _not_native(why: str) -> UnimplementedError:
    return UnimplementedError(
        "MODEL_NOT_NATIVE", f"the native runner cannot take this model: {why}"
    )
