"""Everything that serving compiles, in one list."""

from pageframe.kernels.jit.variants import SHARED_BYTES_MAX, Variant
from pageframe.kernels.jit.variants_attention import attention_variants
from pageframe.kernels.jit.variants_small import small_variants


def serving_variants() -> list[Variant]:
    """All variants of all chips; a name stands once for each chip."""
    variants = [
        variant
        for capability in SHARED_BYTES_MAX
        for variants in (attention_variants(capability), small_variants(capability))
        for variant in variants
    ]
    return list({(variant.capability, variant.name): variant for variant in variants}.values())
