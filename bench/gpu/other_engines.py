"""vLLM and SGLang through their own Python interfaces, where they are installed.

All that is asked of each is here, in one class: a folder with a ``config.json`` and no weights, for
the engine makes up its own; token ids in, the time of each token out. Arguments that are the same
for every size are in ``peer_arguments.json``: half of the device's memory is ours, and nothing is
kept from one request for another.

    vLLM      LLM(...).llm_engine: add_request, has_unfinished_requests, step
    SGLang    Engine(...): loop, async_generate(stream=True), shutdown
"""

import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench.gpu.lab import Sizes
from bench.gpu.loads import Answer, EngineError, Request
from bench.gpu.made_up import llama_config
from bench.gpu.our_engine import Capacity

_ARGUMENTS = Path(__file__).with_name("peer_arguments.json")
_ENTRANCES = {"vllm": "LLM", "sglang": "Engine"}
_PATIENCE_S = 300.0


class VllmEngine:
    """vLLM's engine behind ``LLM``, one ``step`` after the other."""

    name = "vLLM"

    def __init__(
        self, sizes: Sizes, device: torch.device, dtype: torch.dtype, capacity: Capacity
    ) -> None:
        self._library = _import("vllm", self.name)
        self._folder = _model_folder(sizes, dtype, capacity)
        self._llm = self._library.LLM(
            model=self._folder.name,
            dtype=_dtype_name(dtype),
            max_model_len=capacity.max_model_len,
            max_num_seqs=capacity.num_sequences,
            max_num_batched_tokens=capacity.num_step_tokens,
            **fixed_arguments("vllm"),
        )
        self._num_handed_in = 0

    def facts(self) -> dict[str, object]:
        """Its version."""
        return {"vllm": self._library.__version__}

    def serve(self, requests: Sequence[Request]) -> list[Answer]:
        """Do all requests at once; a step's tokens are there when ``step`` returns."""
        engine = self._llm.llm_engine
        answers = {}
        started_s = time.perf_counter()
        for request in requests:
            self._num_handed_in += 1
            answers[str(self._num_handed_in)] = Answer([], [])
            engine.add_request(
                str(self._num_handed_in),
                {"prompt_token_ids": request.prompt_token_ids},
                self._library.SamplingParams(
                    temperature=0.0,
                    max_tokens=request.num_out,
                    ignore_eos=True,
                    detokenize=False,
                ),
            )
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now_s = time.perf_counter() - started_s
            if now_s > _PATIENCE_S:
                raise EngineError(f"vLLM was not done after {_PATIENCE_S:.0f} seconds")
            for output in outputs:
                # All tokens so far: what vLLM tells unless it is asked for differences.
                answer, token_ids = answers[output.request_id], output.outputs[0].token_ids
                num_known = len(answer.times_s)
                answer.token_ids.extend(token_ids[num_known:])
                answer.times_s.extend([now_s] * (len(token_ids) - num_known))
        return list(answers.values())

    def close(self) -> None:
        """Its processes end with the last reference."""
        self._llm = None
        self._folder.cleanup()


class SglangEngine:
    """SGLang's ``Engine``; each request is a stream."""

    name = "SGLang"

    def __init__(
        self, sizes: Sizes, device: torch.device, dtype: torch.dtype, capacity: Capacity
    ) -> None:
        self._library = _import("sglang", self.name)
        self._folder = _model_folder(sizes, dtype, capacity)
        self._engine = self._library.Engine(
            model_path=self._folder.name,
            dtype=_dtype_name(dtype),
            context_length=capacity.max_model_len,
            max_running_requests=capacity.num_sequences,
            chunked_prefill_size=capacity.num_step_tokens,
            **fixed_arguments("sglang"),
        )

    def facts(self) -> dict[str, object]:
        """Its version."""
        return {"sglang": self._library.__version__}

    def serve(self, requests: Sequence[Request]) -> list[Answer]:
        """Do all requests at once; a token's time is that of the chunk that first counts it."""
        started_s = time.perf_counter()

        async def one(request: Request) -> Answer:
            answer = Answer([], [])
            chunks = await self._engine.async_generate(
                input_ids=request.prompt_token_ids,
                sampling_params={
                    "temperature": 0.0,
                    "max_new_tokens": request.num_out,
                    "ignore_eos": True,
                },
                stream=True,
            )
            async for chunk in chunks:
                num_new = int(chunk["meta_info"]["completion_tokens"]) - len(answer.times_s)
                answer.times_s.extend([time.perf_counter() - started_s] * num_new)
            return answer

        async def all_at_once() -> list[Answer]:
            async with asyncio.timeout(_PATIENCE_S):
                return await asyncio.gather(*(one(request) for request in requests))

        try:
            answers: list[Answer] = self._engine.loop.run_until_complete(all_at_once())
        except TimeoutError:
            raise EngineError(f"SGLang was not done after {_PATIENCE_S:.0f} seconds") from None
        return answers

    def close(self) -> None:
        """End its processes."""
        self._engine.shutdown()
        self._folder.cleanup()


PEERS: dict[str, type[VllmEngine] | type[SglangEngine]] = {
    "vllm": VllmEngine,
    "sglang": SglangEngine,
}


def fixed_arguments(peer: str) -> dict[str, Any]:
    """Arguments of a peer's engine that do not depend on what is measured."""
    arguments: dict[str, Any] = json.loads(_ARGUMENTS.read_text(encoding="utf-8"))[peer]
    return arguments


def check_installed(peer: str) -> None:
    """Make sure that a peer can be imported, before anything is made.

    Raises:
        EngineError: it cannot.
    """
    _import(peer, peer)


def _import(module: str, name: str) -> Any:
    try:
        found = import_module(module)
        # Of vLLM there may be kernels alone; see ``carry_vllm``.
        getattr(found, _ENTRANCES[module])
    except (ImportError, AttributeError) as error:
        why = str(error).strip().partition("\n")[0]
        raise EngineError(
            f"{name} cannot be imported here ({why}): install it, or give the Python that has it "
            "as PYTHON=... with SETUP="
        ) from error
    return found


def _model_folder(
    sizes: Sizes, dtype: torch.dtype, capacity: Capacity
) -> "tempfile.TemporaryDirectory[str]":
    """A model's folder without weights."""
    folder = tempfile.TemporaryDirectory(prefix="made-up-llama-")
    entries = llama_config(sizes, capacity.max_model_len, _dtype_name(dtype))
    (Path(folder.name) / "config.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
