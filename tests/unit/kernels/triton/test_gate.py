"""The compile gate lets good kernels pass, and says of bad ones what is wrong."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from pageframe.kernels import jit
from pageframe.kernels.gate.judgement import faults
from pageframe.kernels.gate.machine_code import MachineCode
from pageframe.kernels.gate.serving import serving_variants
from pageframe.kernels.jit.variants import SHARED_BYTES_MAX, Gate, Variant

_TESTS = Path(__file__).resolve().parents[3]


def _run(*words):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(_TESTS)
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def verdicts():
    """Faults of each of the bad kernels, compiled."""
    done = _run("-m", "unit.kernels.triton.bad_kernels")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_good_kernel_has_no_faults(verdicts):
    assert verdicts["good"] == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("spilling", "bytes of stack"),
        ("narrow loads", "registers, 200 are allowed"),
        ("without wgmma", "has no HGMMA"),
        ("narrow loads", "loads moves 16 bytes"),
        ("not there yet", "does not compile"),
    ],
)
def test_a_bad_kernel_is_refused_with_the_reason(verdicts, name, words):
    assert any(words in fault for fault in verdicts[name]), verdicts[name]


def test_the_command_prints_a_table_and_writes_figures(tmp_path):
    figures = tmp_path / "gate.json"
    words = ("--capability", "90", "--only", "swiglu", "--json", str(figures))
    done = _run("-m", "pageframe.kernels.gate", *words)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "sm_90  swiglu bf16" in done.stdout
    (outcome,) = json.loads(figures.read_text())["outcomes"]
    assert outcome["faults"] == []
    assert outcome["code"]["instructions"]["LDG.E.128"] == 2


def test_the_command_refuses_to_judge_nothing():
    assert _run("-m", "pageframe.kernels.gate", "--only", "no such kernel").returncode == 2


def _variant(capability=90, **gate):
    return Variant(
        name="v", kernel=None, signature={}, constexprs={}, capability=capability, gate=Gate(**gate)
    )


def _code(registers=64, stack_bytes=0, shared_bytes=0, **instructions):
    named = {name.replace("_", "."): count for name, count in instructions.items()}
    return MachineCode(
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=shared_bytes,
        instructions=named or {"LDG.E.128": 1},
        seconds=0.0,
    )


def test_each_limit_holds_to_the_unit():
    assert faults(_variant(registers_max=64), _code()) == []
    assert faults(_variant(registers_max=63), _code()) == ["takes 64 registers, 63 are allowed"]
    most = SHARED_BYTES_MAX[90]
    assert faults(_variant(), _code(shared_bytes=most)) == []
    assert len(faults(_variant(), _code(shared_bytes=most + 1))) == 1


def test_local_memory_counts_as_a_spill_even_without_a_stack():
    assert "1 accesses" in faults(_variant(), _code(LDG_E_128=1, STL_64=1))[0]


def test_a_bulk_copy_or_an_asynchronous_one_is_wide():
    assert faults(_variant(), _code(UTMALDG_2D=1)) == []
    assert faults(_variant(), _code(LDGSTS_E_BYPASS_128=1)) == []
    assert len(faults(_variant(), _code(LDG_E_64=3))) == 1


@pytest.mark.parametrize(("capability", "num_faults"), [(80, 0), (90, 1), (100, 0)])
def test_hgmma_is_wanted_on_hopper_alone(capability, num_faults):
    variant = _variant(capability, needs_wgmma=True, needs_tensor_cores=True)
    assert len(faults(variant, _code(LDG_E_128=1, HMMA_16816_F32=4))) == num_faults


def test_every_kernel_serves_in_some_variant_for_every_generation():
    """A kernel's module bears its name; what has no such function is a part of kernels."""
    kernels = {
        module.name
        for module in pkgutil.iter_modules(jit.__path__)
        if hasattr(importlib.import_module(f"pageframe.kernels.jit.{module.name}"), module.name)
        and not module.name.endswith(("_shape", "_tiles"))
    }
    assert {"move_rows", "choose_token", "rotary_write"} <= kernels
    served = {}
    for variant in serving_variants():
        served.setdefault(variant.kernel.__name__, set()).add(variant.capability)
    assert set(served) == kernels
    # Turing multiplies without tensor cores under Triton, so attention begins with Ampere; and 86
    # and 89 differ from 80 in memory and in fp8 alone.
    for name, capabilities in served.items():
        assert capabilities >= {80, 90, 100, 120}, name
