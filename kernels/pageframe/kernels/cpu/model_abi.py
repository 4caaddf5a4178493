"""The structs and calls of ``csrc/pageframe_cpu.h`` that speak of a whole model, for ctypes.

Fields are told in the header; ``model.py`` fills them.
"""

import ctypes
from typing import Final

from pageframe.kernels.cpu.library import LinearShape

_I32, _I64, _F32, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class LinearWeights(ctypes.Structure):
    """``pf_linear_weights``."""

    _fields_ = (("shape", LinearShape), ("packed", _POINTER))


class LayerStruct(ctypes.Structure):
    """``pf_layer``."""

    _fields_ = (
        ("attention_norm", _POINTER),
        ("query_norm", _POINTER),
        ("key_norm", _POINTER),
        ("feed_forward_norm", _POINTER),
        ("query_key_value", LinearWeights),
        ("attention_output", LinearWeights),
        ("gate_up", LinearWeights),
        ("down", LinearWeights),
        ("window", _I64),
    )


class ConfigStruct(ctypes.Structure):
    """``pf_model_config``."""

    _fields_ = (
        ("hidden_size", _I64),
        ("num_layers", _I64),
        ("num_heads", _I64),
        ("num_kv_heads", _I64),
        ("head_dim", _I64),
        ("norm_epsilon", _F32),
        ("score_scale", _F32),
        ("frequencies", _POINTER),
        ("final_norm", _POINTER),
        ("layers", ctypes.POINTER(LayerStruct)),
        ("head", LinearWeights),
        ("embedding", _POINTER),
        ("embedding_dtype", _I32),
        ("reserved", _I32),
    )


class ArenaStruct(ctypes.Structure):
    """``pf_kv_arena``."""

    _fields_ = (
        ("blocks", _POINTER),
        ("block_bytes", _I64),
        ("payload_bytes", _I64),
        ("block_size", _I64),
        ("num_kv_heads", _I64),
        ("head_dim", _I64),
        ("dtype", _I32),
        ("reserved", _I32),
    )


class StepStruct(ctypes.Structure):
    """``pf_step``."""

    _fields_ = (
        ("arena", ctypes.POINTER(ArenaStruct)),
        ("layer_groups", _POINTER),
        ("layer_places", _POINTER),
        ("token_ids", _POINTER),
        ("positions", _POINTER),
        ("slots", _POINTER),
        ("query_start", _POINTER),
        ("context_lens", _POINTER),
        ("block_tables", _POINTER),
        ("rows", _POINTER),
        ("outputs", _POINTER),
        ("phase_ns", _POINTER),
        ("num_tokens", _I64),
        ("num_sequences", _I64),
        ("num_rows", _I64),
        ("table_entries", _I64),
        ("num_groups", _I64),
    )


PROTOTYPES: Final = {
    "pf_model_create": (_POINTER, (ctypes.POINTER(ConfigStruct),)),
    "pf_model_destroy": (None, (_POINTER,)),
    "pf_forward": (_I32, (_POINTER, _POINTER, ctypes.POINTER(StepStruct))),
    "pf_logits": (_I32, (_POINTER, _POINTER, _POINTER, _I64, _POINTER)),
    "pf_decode": (_I32, (_POINTER, _POINTER, ctypes.POINTER(StepStruct), _POINTER)),
}
