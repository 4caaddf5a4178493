"""What a step of OPT-13B costs on an A100 with 40 GB, and how much KV memory it has.

    step = host + weights / bandwidth + new tokens * compute + context tokens * KV bytes / bandwidth

The parts are added, not overlapped. Sources:

    weights 26 GB, KV memory 12 GiB = 15,728 slots of 800 KiB   Kwon et al., SOSP 2023, table 1
    1,555 GB/s, 312 Tflop/s (fp16, dense)                       NVIDIA A100 40GB data sheet
    2 flop per parameter and token                              Kaplan et al., arXiv 2001.08361
    host: 9 ms between steps, the middle of 5 to 13 ms          vllm-project/vllm#6854, of 2024
    80 % of the bandwidth, 50 % of the compute                  assumed

Whoever doubts the assumptions looks at ``ROOFLINE``: the same with a perfect device and no host.
The paper's figures come from a real machine; a formula can only show what follows from memory.
"""

from dataclasses import dataclass

from pageframe.executor.model.sim import SimCost

_NS = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """One model on one device.

    Attributes:
        name: For tables.
        num_parameters: Of the model.
        weight_bytes: Read in every step.
        kv_bytes_per_token: Keys and values of one token over all layers.
        kv_memory_bytes: Memory for keys and values.
        bandwidth_bytes_per_s: Of the device's memory, as reached.
        flops_per_s: Of the device, as reached.
        host_ns: Time in each step in which the device does nothing.
    """

    name: str
    num_parameters: float
    weight_bytes: float
    kv_bytes_per_token: int
    kv_memory_bytes: int
    bandwidth_bytes_per_s: float
    flops_per_s: float
    host_ns: float

    @property
    def num_slots(self) -> int:
        """Tokens that KV memory holds."""
        return self.kv_memory_bytes // self.kv_bytes_per_token

    @property
    def step_ns(self) -> float:
        """What every step costs, whatever is in it."""
        return self.host_ns + self.weight_bytes / self.bandwidth_bytes_per_s * _NS

    @property
    def token_ns(self) -> float:
        """What each computed token costs."""
        return 2 * self.num_parameters / self.flops_per_s * _NS

    @property
    def context_token_ns(self) -> float:
        """What it costs to read the keys and values of one token."""
        return self.kv_bytes_per_token / self.bandwidth_bytes_per_s * _NS

    def copy_ns(self, num_tokens: float) -> float:
        """What it costs to copy keys and values of ``num_tokens`` slots: one read, one write."""
        return 2 * num_tokens * self.context_token_ns

    def of_step(self, num_new_tokens: float, num_context_tokens: float) -> float:
        """Nanoseconds of a step that computes tokens over contexts, the new tokens included."""
        return (
            self.step_ns
            + self.token_ns * num_new_tokens
            + self.context_token_ns * num_context_tokens
        )

    def sim_cost(self) -> SimCost:
        """The same for the simulated runner."""
        return SimCost(
            step_ns=self.step_ns,
            prefill_token_ns=self.token_ns,
            decode_sequence_ns=self.token_ns,
            context_token_ns=self.context_token_ns,
        )


def _opt_13b(name: str, *, bandwidth: float, compute: float, host_ns: float) -> CostModel:
    """OPT-13B on an A100-40GB that reaches these shares of its peaks."""
    return CostModel(
        name=name,
        num_parameters=13e9,
        weight_bytes=26e9,
        # Keys and values, 5,120 wide, of 40 layers, 2 bytes each.
        kv_bytes_per_token=2 * 5120 * 40 * 2,
        kv_memory_bytes=12 * 1024**3,
        bandwidth_bytes_per_s=bandwidth * 1555e9,
        flops_per_s=compute * 312e12,
        host_ns=host_ns,
    )


SERVER = _opt_13b("OPT-13B, A100-40GB", bandwidth=0.8, compute=0.5, host_ns=9e6)
ROOFLINE = _opt_13b("OPT-13B, perfect A100-40GB", bandwidth=1.0, compute=1.0, host_ns=0.0)
