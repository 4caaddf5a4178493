"""Settings of the model and of what computes it."""

from pydantic import Field

from pageframe.config.option_types import (
    DEVICE_PATTERN,
    Count,
    CpuKernelsName,
    Dtype,
    DtypeName,
    RunnerName,
    Seconds,
    SettingsGroup,
)

EMBEDDED_MODEL = "smollm2-135m-instruct"


class ModelSettings(SettingsGroup):
    """Which model is served, and on what."""

    model: str = Field(
        EMBEDDED_MODEL, min_length=1, description="A prepared name, a folder or a Hugging Face id."
    )
    runner: RunnerName = Field(RunnerName.AUTO, description="Who computes a step.")
    device: str = Field(
        "auto", pattern=DEVICE_PATTERN, description="auto, cpu, cuda or cuda:INDEX."
    )
    dtype: Dtype = Field(DtypeName.AUTO, description="Type of weights and activations.")
    max_model_len: Count = Field(
        0, ge=0, description="Longest prompt and output together; 0 is the model's own."
    )
    threads: Count = Field(
        0, ge=0, le=4096, description="CPU threads for computing; 0 is what the machine grants."
    )
    cpu_kernels: CpuKernelsName = Field(
        CpuKernelsName.AUTO, description="Kernels of the native runner on a CPU."
    )
    cuda_graphs: bool = Field(True, description="Record decode steps on a GPU as CUDA graphs.")
    deterministic: bool = Field(
        False, description="Refuse to start where a token could depend on its batch."
    )
    sim_step_seconds: Seconds = Field(
        0.002,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        description='Time that each step of the sim runner takes ("2ms").',
    )
