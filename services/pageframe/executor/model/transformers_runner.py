"""Any Hugging Face causal model, through the attention interface of transformers.

The model's own code runs over one flat batch, ``[1, T]``, with the positions of each token and no
cache of its own. Its attention modules call ``paged_attention_forward`` instead of their own
arithmetic; that function finds the step's tables on the module. No mask function is registered
under our name, and transformers then builds no mask at all: the block tables are the mask.

What a model keeps per token is not read from its config, where each family says it in its own
words: one token is run through it before there is any pool, and the attention calls are recorded.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from pageframe.core.errors import InvalidRequestError, UnimplementedError
from pageframe.executor.model.decoder import KvShape
from pageframe.executor.model.paged_kv import PagedKv
from pageframe.executor.model.weights import NEVER_MISSED

_ATTENTION_NAME = "pageframe_paged"
_TABLES_ATTRIBUTE = "pageframe_tables"
# Arguments of attention functions that change the result and that paged attention does not know.
_UNKNOWN_ARGUMENTS = ("softcap", "s_aux", "position_bias", "head_mask", "indices")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One attention call as the probe saw it."""

    layer_index: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    num_keys: int
    window: int | None
    is_causal: bool
    unknown: tuple[str, ...]


class _Tables:
    """What all attention modules of one model share: the step's tables, or a list of calls."""

    def __init__(self) -> None:
        self.kv: PagedKv | None = None
        self.calls: list[_Call] = []


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for ``AttentionInterface``.

    Args:
        module: An attention module with ``layer_idx``, of a model that ``TransformersDecoder``
            prepared.
        query: shape (1, num_heads, T, head_dim).
        key: shape (1, num_kv_heads, T, head_dim).
        value: The same.
        attention_mask: Not used; transformers builds none for this function.
        scaling: Multiplies scores; None for ``head_dim ** -0.5``.
        **kwargs: Whatever else the model passes on. ``sliding_window`` is how many positions a
            token sees, None for all; a module that does not pass it on may have it.

    Returns:
        shape (1, T, num_heads, head_dim), and None for the weights.
    """
    tables: _Tables = getattr(module, _TABLES_ATTRIBUTE)
    window = kwargs.get("sliding_window", getattr(module, "sliding_window", None)) or None
    if tables.kv is None:
        tables.calls.append(
            _Call(
                layer_index=int(module.layer_idx),
                num_kv_heads=key.shape[1],
                key_dim=key.shape[3],
                value_dim=value.shape[3],
                num_keys=key.shape[2],
                window=window,
                is_causal=getattr(module, "is_causal", True) is not False,
                unknown=tuple(name for name in _UNKNOWN_ARGUMENTS if kwargs.get(name) is not None),
            )
        )
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    mixed = tables.kv.attend(
        int(module.layer_idx),
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=query.shape[3] ** -0.5 if scaling is None else scaling,
        window=window,
    )
    return mixed[None], None


class TransformersDecoder:
    """A ``Decoder`` around a transformers model."""

    reads_batch = False

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[int, int], None],
    ) -> None:
        """Load the model and see what it keeps per token.

        Raises:
            UnimplementedError: reason MODEL_UNSUPPORTED; its attention cannot be paged.
            InvalidRequestError: reason MODEL_WEIGHTS_INVALID; they are not what the config says.
        """
        AttentionInterface.register(_ATTENTION_NAME, paged_attention_forward)
        progress(0, 1)
        model = _load(folder, dtype)
        progress(1, 1)
        self._model: PreTrainedModel = model.eval().to(device)
        self._tables = _Tables()
        for module in self._model.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, _TABLES_ATTRIBUTE, self._tables)
        self.kv_shape = self._probe(device)

    def forward(
        self,
        kv: PagedKv,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """Run the model; logits of ``rows``. See ``Decoder.forward``.

        Logits and not hidden states, because families scale or cap them after the head.
        """
        self._tables.kv = kv
        return self._run(token_ids, positions, rows)

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """Logits in float32. See ``Decoder.logits``."""
        return outputs.float()

    def _run(
        self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        output = self._model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=rows,
        )
        logits: torch.Tensor = output.logits[0]
        # A model that does not know ``logits_to_keep`` swallows it and gives all rows.
        if logits.shape[0] != rows.shape[0]:
            logits = logits.index_select(0, rows)
        return logits

    def _probe(self, device: torch.device) -> KvShape:
        """Run two tokens and derive the KV shape from the attention calls."""
        tokens = torch.zeros(2, dtype=torch.int64, device=device)
        try:
            with torch.inference_mode():
                self._run(tokens, torch.arange(2, device=device), tokens[:1])
        except (TypeError, KeyError, AttributeError) as error:
            raise _unsupported(f"it does not run over a flat batch: {error}") from error
        calls = self._tables.calls
        if not calls:
            raise _unsupported("it does not call transformers' attention interface")
        first = calls[0]
        for call in calls:
            if call.unknown:
                raise _unsupported(f"its attention needs {', '.join(call.unknown)}")
            if not call.is_causal or call.num_keys != 2:
                raise _unsupported(f"layer {call.layer_index} is not plain causal self-attention")
            if call.key_dim != call.value_dim or (call.num_kv_heads, call.key_dim) != (
                first.num_kv_heads,
                first.key_dim,
            ):
                raise _unsupported("keys and values differ in shape, among them or among layers")
        num_layers = len(calls)
        if sorted(call.layer_index for call in calls) != list(range(num_layers)):
            raise _unsupported("its layers do not each keep keys and values of their own")
        for call in calls:
            self._check_window(call)
        return KvShape(
            num_layers=num_layers, num_kv_heads=first.num_kv_heads, head_dim=first.key_dim
        )

    def _check_window(self, call: _Call) -> None:
        """Refuse a layer that hides positions by a mask alone, which nobody makes for us."""
        config = self._model.config.get_text_config()
        kinds: list[str] = getattr(config, "layer_types", None) or []
        # Without a list of kinds, a window that the config names is meant for all layers.
        is_listed = call.layer_index < len(kinds)
        kind = kinds[call.layer_index] if is_listed else "sliding_attention"
        if kind == "chunked_attention":
            raise _unsupported(f"layer {call.layer_index} sees only its chunk of the positions")
        window = getattr(config, "sliding_window", None)
        is_used = getattr(config, "use_sliding_window", True) and kind == "sliding_attention"
        if is_used and window and window < _num_positions(config) and call.window is None:
            raise _unsupported(
                f"layer {call.layer_index} hides all but {window} positions by a mask alone"
            )


def _load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with all of its weights.

    transformers makes up what a checkpoint lacks and drops what its config has no place for, with
    no more than a warning.
    """
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=_ATTENTION_NAME,
            local_files_only=True,
            output_loading_info=True,
            # So that these are told like the others, and not as an error without a type.
            ignore_mismatched_sizes=True,
        )
    except (ValueError, KeyError) as error:
        raise _unsupported(f"transformers does not load it with our attention: {error}") from error
    faults = {
        "are missing": found["missing_keys"],
        "have another shape than config.json says": [key for key, *_ in found["mismatched_keys"]],
        "are unknown to config.json": [
            key for key in found["unexpected_keys"] if not key.endswith(NEVER_MISSED)
        ],
    }
    for fault, names in faults.items():
        if names:
            raise InvalidRequestError(
                "MODEL_WEIGHTS_INVALID",
                f"{len(names)} tensors {fault}, {min(names)} among them",
                num_tensors=len(names),
            )
    loaded: PreTrainedModel = model
    return loaded


def _num_positions(config: PreTrainedConfig) -> int:
    """The longest sequence that the config speaks of; without bound where it does not."""
    return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)


def _unsupported(why: str) -> UnimplementedError:
    return UnimplementedError(
        "MODEL_UNSUPPORTED", f"the transformers runner cannot take this model: {why}"
    )
