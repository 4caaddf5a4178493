"""OpenVINO GenAI's continuous batching; ENGINE_MODEL is a folder that optimum-cli exported."""

import os
from typing import Any

_PRECISIONS = {"bfloat16": "bf16", "float32": "f32"}


class Engine:
    """A continuous-batching pipeline with its prefix cache on, as users run it."""

    def __init__(self) -> None:
        import numpy
        import openvino_genai

        self._genai = openvino_genai
        self._numpy = numpy
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.cache_size = 4
        scheduling.max_num_seqs = 64
        scheduling.max_num_batched_tokens = 2048
        scheduling.dynamic_split_fuse = True
        scheduling.enable_prefix_caching = True
        options = {
            "INFERENCE_NUM_THREADS": int(os.environ["OMP_NUM_THREADS"]),
            "INFERENCE_PRECISION_HINT": _PRECISIONS[os.environ["ENGINE_DTYPE"]],
        }
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            os.environ["ENGINE_MODEL"], scheduling, "CPU", options
        )

    def versions(self) -> dict[str, str]:
        return {"openvino-genai": self._genai.__version__}

    def run(self, requests: list[dict[str, Any]], temperature: float, n: int) -> list[list[int]]:
        import openvino

        prompts = [
            openvino.Tensor(
                self._numpy.array([request["prompt_token_ids"]], dtype=self._numpy.int64)
            )
            for request in requests
        ]
        configs = [self._config(request, temperature, n) for request in requests]
        done = self._pipeline.generate(prompts, configs)
        return [[len(ids) for ids in request.m_generation_ids] for request in done]

    def _config(self, request: dict[str, Any], temperature: float, n: int) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = request["num_output_tokens"]
        config.min_new_tokens = request["num_output_tokens"]
        config.ignore_eos = True
        config.num_return_sequences = n
        config.do_sample = temperature > 0
        if temperature > 0:
            config.temperature, config.top_p, config.top_k = temperature, 1.0, 1 << 30
        return config


if __name__ == "__main__":
    from protocol import serve

    serve(Engine())
