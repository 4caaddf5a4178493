"""Hugging Face transformers, its continuous batching."""

import os
from typing import Any


class Engine:
    """A manager of continuous batching, kept between runs."""

    def __init__(self) -> None:
        import torch
        import transformers

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self._transformers = transformers
        self._running: tuple[float, Any] | None = None
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            os.environ["ENGINE_MODEL"],
            dtype=getattr(torch, os.environ["ENGINE_DTYPE"]),
            attn_implementation="sdpa",
        ).eval()

    def versions(self) -> dict[str, str]:
        return {"transformers": self._transformers.__version__}

    def run(self, requests: list[dict[str, Any]], temperature: float, n: int) -> list[list[int]]:
        manager = self._manager(temperature)
        # It knows no samples of one prompt: each is a request of its own.
        index_of = {
            manager.add_request(
                list(request["prompt_token_ids"]),
                max_new_tokens=request["num_output_tokens"],
                eos_token_id=-1,
            ): index
            for index, request in enumerate(requests)
            for _ in range(n)
        }
        lengths: list[list[int]] = [[] for _ in requests]
        num_left = len(index_of)
        while num_left:
            done = manager.get_result(timeout=1)
            if done is None:
                assert manager.is_running(), "continuous batching has stopped"
            elif done.error:
                raise RuntimeError(done.error)
            elif done.is_finished():
                lengths[index_of[done.request_id]].append(len(done.generated_tokens))
                num_left -= 1
        return lengths

    def _manager(self, temperature: float) -> Any:
        """The running manager; sampling is the same for all its requests."""
        if self._running is not None and self._running[0] == temperature:
            return self._running[1]
        if self._running is not None:
            self._running[1].stop(block=True, timeout=20)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
        manager = self._model.init_continuous_batching(
            generation_config=self._transformers.GenerationConfig(
                max_new_tokens=256,
                eos_token_id=-1,
                pad_token_id=2,
                bos_token_id=1,
                **(sampling if temperature > 0 else {"do_sample": False}),
            ),
            continuous_batching_config=self._transformers.ContinuousBatchingConfig(
                page_size=32, num_blocks=1024, max_batch_tokens=1024
            ),
        )
        manager.start()
        self._running = (temperature, manager)
        return manager


if __name__ == "__main__":
    from protocol import serve

    serve(Engine())
