"""What is wrong with the machine code of a variant, in sentences with numbers."""

from pageframe.kernels.gate.machine_code import MachineCode
from pageframe.kernels.jit.variants import SHARED_BYTES_MAX, Variant

_LOCAL_MEMORY = ("LDL", "STL")
# Products on tensor cores by generation: from Volta on, Hopper's asynchronous ones, Blackwell's.
_ASYNC_PRODUCTS = ("HGMMA", "IGMMA", "QGMMA")
_PRODUCTS = ("HMMA", "IMMA", "QMMA", "OMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", *_ASYNC_PRODUCTS)
_HOPPER = 90
# Bulk copies of the tensor memory accelerator move more than 16 bytes at once.
_BULK_COPIES = ("UTMALDG", "UBLKCP")
LOADS = ("LDG", "LDGSTS")


def faults(variant: Variant, code: MachineCode) -> list[str]:
    """Why this code must not serve; empty if it may."""
    gate = variant.gate
    found = []
    num_spills = code.count(*_LOCAL_MEMORY)
    if code.stack_bytes or num_spills:
        found.append(f"spills: {code.stack_bytes} bytes of stack, {num_spills} accesses to it")
    if code.registers > gate.registers_max:
        found.append(f"takes {code.registers} registers, {gate.registers_max} are allowed")
    shared_bytes_max = SHARED_BYTES_MAX[variant.capability]
    if code.shared_bytes > shared_bytes_max:
        found.append(f"takes {code.shared_bytes} bytes of shared memory of {shared_bytes_max}")
    if gate.needs_tensor_cores and not code.count(*_PRODUCTS):
        found.append("multiplies without tensor cores")
    if gate.needs_wgmma and variant.capability == _HOPPER and not code.count(*_ASYNC_PRODUCTS):
        found.append("has no HGMMA: its products wait for themselves")
    if gate.needs_wide_loads and not num_wide_loads(code):
        found.append(f"none of its {code.count(*LOADS)} loads moves 16 bytes")
    return found


def num_wide_loads(code: MachineCode) -> int:
    """Loads and asynchronous copies from global memory that move 16 bytes or more per thread."""
    return code.count_wide(*LOADS) + code.count(*_BULK_COPIES)
