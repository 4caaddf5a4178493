"""Every variant of the attention kernels that serving launches, for the gate to compile.

A model like Llama-3-8B (32 query heads on 8 key heads of 128 channels, 32 layers, blocks of 16)
on every chip with each type of cache; on Hopper also other widths and groups. Chips older than
Ampere have none: Triton multiplies without tensor cores there, and ``ops`` refuses them.
"""

from dataclasses import dataclass
from typing import Any

from pageframe.kernels.jit.attention_shape import AttentionShape, padded_dim
from pageframe.kernels.jit.attention_tiles import AttentionTiles, Tile, attention_tiles
from pageframe.kernels.jit.merge_splits import merge_splits
from pageframe.kernels.jit.paged_decode import paged_decode
from pageframe.kernels.jit.paged_prefill import paged_prefill
from pageframe.kernels.jit.shared_prefix import shared_prefix
from pageframe.kernels.jit.split_plan import split_plan
from pageframe.kernels.jit.variants import FP8_CAPABILITY_MIN, Gate, Variant

_CAPABILITY_MIN = 80
_NUM_LAYERS = 32
_BLOCK_SIZE = 16
_ITEMSIZE = {"bf16": 2, "fp16": 2, "i8": 1, "fp8e4nv": 1}
_TYPES = {
    "kv_scales": "*fp32",
    "slopes": "*fp32",
    "tables": "*i32",
    "items": "*i32",
    "slots": "*i32",
    "chunks": "*i32",
    "prefixes": "*i32",
    "merges": "*i32",
    "context_lens": "*i32",
    "partial_output": "*fp32",
    "partial_lse": "*fp32",
    "table_stride": "i32",
    "num_slots": "i32",
    "num_items": "i32",
    "scale": "fp32",
}
# Two programs of four warps, or more, on a multiprocessor of 65,536 registers.
_DECODE_REGISTERS_MAX = 128
_REGISTERS_MAX = 255


@dataclass(frozen=True, slots=True)
class _Model:
    """What attention is compiled for, by its names in signatures."""

    name: str
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    query: str = "bf16"
    stored: str = "bf16"
    window: int = 0
    has_slopes: bool = False

    @property
    def is_quantised(self) -> bool:
        return _ITEMSIZE[self.stored] == 1

    def shape(self) -> AttentionShape:
        """Strides are those of ``layouts.py``."""
        token = self.num_kv_heads * self.head_dim
        side = _BLOCK_SIZE * token
        block_bytes = _NUM_LAYERS * 2 * side * _ITEMSIZE[self.stored]
        scale_strides = None
        if self.is_quantised:
            scale_side = _BLOCK_SIZE * self.num_kv_heads
            block_bytes += _NUM_LAYERS * 2 * scale_side * 4
            scale_strides = (block_bytes // 4, scale_side, self.num_kv_heads, 1)
        return AttentionShape(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_size=_BLOCK_SIZE,
            query_stride=(self.num_heads + 2 * self.num_kv_heads) * self.head_dim,
            layer_strides=(block_bytes // _ITEMSIZE[self.stored], side, token, self.head_dim),
            scale_strides=scale_strides,
            has_slopes=self.has_slopes,
            dot_dtype="fp16" if self.stored == "fp8e4nv" else self.query,
        )

    def tiles(self, capability: int) -> AttentionTiles:
        return attention_tiles(
            capability=capability,
            num_processors=132,
            group_size=self.num_heads // self.num_kv_heads,
            padded_dim=padded_dim(self.head_dim),
            dot_itemsize=2,
            itemsize=_ITEMSIZE[self.stored],
        )


_WIDE = _Model("bf16")
_EVERYWHERE = (_WIDE, _Model("int8", stored="i8"))
_WITH_FP8 = (*_EVERYWHERE, _Model("fp8", stored="fp8e4nv"))
_ON_HOPPER = (
    *_WITH_FP8,
    _Model("fp16", query="fp16", stored="fp16"),
    _Model("dim64", num_heads=9, num_kv_heads=3, head_dim=64),
    _Model("dim96", num_heads=32, num_kv_heads=32, head_dim=96, window=2048),
    _Model("dim256", num_heads=8, num_kv_heads=4, head_dim=256),
    _Model("alibi", num_heads=32, num_kv_heads=32, head_dim=64, has_slopes=True),
    _Model("group71", num_heads=71, num_kv_heads=1, head_dim=64),
)


def attention_variants(capability: int) -> list[Variant]:
    """Variants for one compute capability, times ten; none below 80.

    Capabilities 86 and 89 have the tiles and instructions of 80 and less shared memory: what they
    launch most stands for the rest. Windows are compiled where compiling takes seconds.
    """
    if capability < _CAPABILITY_MIN:
        return []
    models: tuple[_Model, ...] = _WITH_FP8 if capability >= FP8_CAPABILITY_MIN else _EVERYWHERE
    if capability == 90:
        models = _ON_HOPPER
    variants = [make(model, capability) for model in models for make in (_decode, _prefill)]
    if capability in (86, 89):
        return variants
    variants += [_split(capability), _merge(capability)]
    if capability in (80, 90):
        variants.append(_prefill(_Model("window", window=4096), capability))
    variants += [
        make(model, capability)
        for model in (_EVERYWHERE if capability == 90 else [_WIDE])
        for make in (_short_prefill, _prefix)
    ]
    return variants


def _decode(model: _Model, capability: int) -> Variant:
    tile = model.tiles(capability).decode
    # Large groups are bound by products, as prefill is.
    registers_max = _DECODE_REGISTERS_MAX if tile.rows == 16 else _REGISTERS_MAX
    gate = Gate(registers_max=registers_max, needs_tensor_cores=True)
    return _variant("decode", paged_decode, model, tile, capability, gate)


def _prefill(model: _Model, capability: int) -> Variant:
    tile = model.tiles(capability).prefill
    return _variant(
        "prefill", paged_prefill, model, tile, capability, _wgmma(), WINDOW=model.window
    )


def _short_prefill(model: _Model, capability: int) -> Variant:
    tile = model.tiles(capability).short_prefill
    name = "short-prefill"
    return _variant(name, paged_prefill, model, tile, capability, _wgmma(), WINDOW=model.window)


def _prefix(model: _Model, capability: int) -> Variant:
    tile = model.tiles(capability).prefix
    return _variant("prefix", shared_prefix, model, tile, capability, _wgmma())


def _wgmma() -> Gate:
    return Gate(registers_max=_REGISTERS_MAX, needs_tensor_cores=True, needs_wgmma=True)


def _variant(
    name: str,
    kernel: Any,
    model: _Model,
    tile: Tile,
    capability: int,
    gate: Gate,
    **more: object,
) -> Variant:
    return _of(
        f"{name}-{model.name}",
        kernel,
        {"query": f"*{model.query}", "layer": f"*{model.stored}", "output": f"*{model.query}"},
        {**model.shape().constants(tile.rows, tile.keys), **more},
        capability=capability,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        gate=gate,
    )


def _merge(capability: int) -> Variant:
    constants = _WIDE.shape().merge_constants()
    gate = Gate(registers_max=_DECODE_REGISTERS_MAX)
    return _of(
        "merge-splits",
        merge_splits,
        {"output": "*bf16"},
        constants,
        capability=capability,
        gate=gate,
    )


def _split(capability: int) -> Variant:
    constants = {
        "SLOTS": 1024,
        "TARGET_ITEMS": 49,
        "TILE": _WIDE.tiles(capability).decode.keys,
        "TILES_MIN": 4,
        "TILES_FIXED": 0,
    }
    gate = Gate(registers_max=_DECODE_REGISTERS_MAX, needs_wide_loads=False)
    return _of(
        "split-plan", split_plan, {}, constants, capability=capability, num_warps=8, gate=gate
    )


def _of(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: Any
) -> Variant:
    """All addresses are multiples of 16; counts are never specialised."""
    signature = {
        argument: "constexpr" if argument in constants else {**_TYPES, **types}[argument]
        for argument in kernel.arg_names
    }
    addresses = frozenset(name for name, kind in signature.items() if kind.startswith("*"))
    return Variant(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constants,
        divisible_by_16=addresses,
        **options,
    )
