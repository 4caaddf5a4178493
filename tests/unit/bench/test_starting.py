"""How starts are summed up, and what they are started with."""

from pathlib import Path

from bench.starting import Start, environment, summarise


def test_figures_are_summed_up_by_process_and_in_all():
    starts = [
        Start(ready_s=4.0, first_token_s=0.03, cpu_s={"up": 0.5, "executor": 3.0}),
        Start(ready_s=3.0, first_token_s=0.05, cpu_s={"up": 0.25, "executor": 4.0}),
        Start(ready_s=8.0, first_token_s=0.04, cpu_s={"up": 0.25, "executor": 3.5}),
    ]
    assert summarise(starts) == {
        "ready_s": {"min": 3.0, "median": 4.0, "max": 8.0},
        "first_token_s": {"min": 0.03, "median": 0.04, "max": 0.05},
        "cpu_s": {"min": 3.5, "median": 3.75, "max": 4.25},
        "cpu_s_by_process": {
            "executor": {"min": 3.0, "median": 3.5, "max": 4.0},
            "up": {"min": 0.25, "median": 0.25, "max": 0.5},
        },
    }


def test_a_checkout_is_started_from_its_own_sources_and_without_settings_of_whoever_measures():
    environ = {
        "PATH": "/bin",
        "PAGEFRAME_DTYPE": "fp32",
        "PAGEFRAME_MODELS_DIR": "/models",
        "OTEL_SDK_DISABLED": "true",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": "/elsewhere",
    }
    assert environment(Path("/old"), environ) == {
        "PATH": "/bin",
        "PAGEFRAME_MODELS_DIR": "/models",
        "PYTHONPATH": "/old/kernels:/old/protos:/old/services:/old/shared",
    }
