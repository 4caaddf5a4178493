"""vLLM on a CPU, its engine in this process or, with ENGINE_SPLIT=1, in processes of its own."""

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", os.environ.get("ENGINE_SPLIT", "0"))
_NUM_THREADS = int(os.environ["OMP_NUM_THREADS"])
os.environ.setdefault(
    "VLLM_CPU_OMP_THREADS_BIND", f"0-{_NUM_THREADS - 1}" if _NUM_THREADS > 1 else "0"
)


class Engine:
    """vLLM's offline engine."""

    def __init__(self) -> None:
        import vllm

        self._vllm = vllm
        self._engine = vllm.LLM(
            model=os.environ["ENGINE_MODEL"],
            dtype=os.environ["ENGINE_DTYPE"],
            max_model_len=2048,
            max_num_seqs=64,
            max_num_batched_tokens=2048,
            seed=0,
        )

    def versions(self) -> dict[str, str]:
        import torch

        return {"vllm": self._vllm.__version__, "torch": torch.__version__}

    def run(self, requests: list[dict[str, Any]], temperature: float, n: int) -> list[list[int]]:
        self._engine.reset_prefix_cache()
        done = self._engine.generate(
            [{"prompt_token_ids": request["prompt_token_ids"]} for request in requests],
            [
                self._vllm.SamplingParams(
                    temperature=temperature,
                    n=n,
                    max_tokens=request["num_output_tokens"],
                    min_tokens=request["num_output_tokens"],
                    ignore_eos=True,
                    detokenize=False,
                )
                for request in requests
            ],
            use_tqdm=False,
        )
        return [[len(sample.token_ids) for sample in request.outputs] for request in done]


if __name__ == "__main__":
    from protocol import serve

    serve(Engine())
