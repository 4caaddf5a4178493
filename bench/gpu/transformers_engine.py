"""Hugging Face transformers, its continuous batching, over the same made-up weights.

It attends with FlashAttention where that is installed. Elsewhere it falls back to ``paged|sdpa``,
which repeats heads of keys and masks all tokens against all: several times slower, so the
attention in use is part of the figures.
"""

import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from bench.gpu.lab import Sizes
from bench.gpu.loads import Answer, EngineError, Request
from bench.gpu.made_up import llama_config, make_up
from bench.gpu.our_engine import Capacity

_BLOCK_SIZE = 256
_PATIENCE_S = 120.0
_STOP_TIMEOUT_S = 20.0


class TransformersEngine:
    """One manager of continuous batching, kept between loads."""

    name = "transformers"

    def __init__(
        self, sizes: Sizes, device: torch.device, dtype: torch.dtype, capacity: Capacity
    ) -> None:
        try:
            import transformers
        except ImportError as error:
            raise EngineError(f"transformers cannot be imported here: {error}") from error
        self._version = transformers.__version__
        self._model = _make_model(transformers, sizes, device, dtype, capacity.max_model_len)
        self._manager = self._model.init_continuous_batching(
            generation_config=transformers.GenerationConfig(
                do_sample=False,
                max_new_tokens=capacity.max_model_len,
                eos_token_id=-1,
                pad_token_id=0,
                bos_token_id=0,
            ),
            continuous_batching_config=_batching(transformers, capacity),
        )
        self._manager.start()

    def facts(self) -> dict[str, object]:
        """Version, and which attention it took."""
        attention = str(self._model.config._attn_implementation)
        return {"transformers": self._version, "attention": attention}

    def serve(self, requests: Sequence[Request]) -> list[Answer]:
        """Do all requests at once. Times are those that it stamps each token with."""
        started_s = time.perf_counter()
        places = {
            self._manager.add_request(
                request.prompt_token_ids,
                max_new_tokens=request.num_out,
                eos_token_id=-1,
                record_timestamps=True,
            ): place
            for place, request in enumerate(requests)
        }
        if len(places) != len(requests):
            raise EngineError("transformers took in fewer requests than it was given")
        answers: dict[int, Answer] = {}
        while len(answers) < len(requests):
            done = self._manager.get_result(timeout=_PATIENCE_S)
            if done is None:
                raise EngineError(
                    f"continuous batching gave nothing in {_PATIENCE_S:.0f} seconds "
                    f"(running: {self._manager.is_running()})"
                )
            if done.error:
                raise EngineError(f"continuous batching failed: {done.error}")
            if done.is_finished():
                times = [stamp - started_s for stamp in done.timestamps]
                answers[places[done.request_id]] = Answer(list(done.generated_tokens), times)
        return [answers[place] for place in range(len(requests))]

    def close(self) -> None:
        """Stop its thread, and give back weights and cache."""
        self._manager.stop(block=True, timeout=_STOP_TIMEOUT_S)
        self._manager = self._model = None


def _make_model(
    library: Any, sizes: Sizes, device: torch.device, dtype: torch.dtype, max_model_len: int
) -> Any:
    entries = llama_config(sizes, max_model_len)
    config = library.LlamaConfig(**{key: entries[key] for key in entries if key != "torch_dtype"})
    config.dtype = dtype
    with torch.device(device):
        model = library.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            make_up(name, parameter)
    return model.eval()


def _batching(library: Any, capacity: Capacity) -> Any:
    """As many tokens of cache as we have; what it can find out by itself is left to it."""
    kind = library.ContinuousBatchingConfig
    names = {field.name for field in fields(kind)}
    # Version 5.23 calls page_size what 5.17 calls block_size.
    size_name = "page_size" if "page_size" in names else "block_size"
    num_blocks = -(-capacity.num_tokens // _BLOCK_SIZE) + 2 * capacity.num_sequences
    return kind(
        **{size_name: _BLOCK_SIZE},
        num_blocks=num_blocks,
        max_batch_tokens=capacity.num_step_tokens,
        allow_block_sharing=False,
    )
