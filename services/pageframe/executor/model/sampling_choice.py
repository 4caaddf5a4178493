"""Who chooses tokens of a loaded model: the sampler alone, or a GPU that runs by itself."""

from dataclasses import dataclass
from functools import partial

import torch

from pageframe.executor.batch import ModelFacts
from pageframe.executor.model.announcing import Announce
from pageframe.executor.model.decoder import Decoder
from pageframe.executor.model.device_steps import DeviceSteps, GraphParts
from pageframe.executor.model.fused import FusedDecoder
from pageframe.executor.model.grammar_store import GrammarStore
from pageframe.executor.model.graph_recorder import CudaRecorder
from pageframe.executor.model.native_choice import TRITON
from pageframe.executor.model.paged_kv import compute_dtype
from pageframe.executor.model.sampler import Sampler
from pageframe.kernels.layouts import KvLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRequest:
    """A loaded model whose tokens are to be chosen.

    Attributes:
        decoder: The model.
        facts: About it.
        device: Where its logits are.
        grammars: Compiled grammars; None where no sequence can have one.
        max_num_sequences: Rows of the sampler, and most sequences of a step.
        has_graphs: Whether a GPU may record its decode steps.
        announce: Told how far recording is.
    """

    decoder: Decoder
    facts: ModelFacts
    device: torch.device
    grammars: GrammarStore | None
    max_num_sequences: int
    has_graphs: bool
    announce: Announce


def choose_sampling(request: SamplingRequest) -> tuple[Sampler, DeviceSteps | None]:
    """The sampler, and what runs on the device by itself; None where that is nothing."""
    decoder, facts, device = request.decoder, request.facts, request.device
    if facts.kernels == TRITON:
        return _on_device(request)
    kernels = decoder.draw if isinstance(decoder, FusedDecoder) else None
    sampler = Sampler(
        facts.vocab_size,
        request.max_num_sequences,
        facts.eos_token_ids,
        device,
        request.grammars,
        kernels=kernels,
    )
    return sampler, None


def _on_device(request: SamplingRequest) -> tuple[Sampler, DeviceSteps]:
    # Late, because Triton is there only where there is a GPU.
    from pageframe.executor.model.device_decoder import DeviceDecoder
    from pageframe.executor.model.device_sampler import DeviceSampler
    from pageframe.kernels.ops.triton_attention import TritonAttention
    from pageframe.kernels.ops.triton_attention_checks import fits_device

    decoder, facts, device = request.decoder, request.facts, request.device
    assert isinstance(decoder, DeviceDecoder), f"{type(decoder)} does not run on Triton"

    def make_attention(layout: KvLayout) -> TritonAttention | None:
        dtype = compute_dtype(decoder.dtype, layout, device)
        if not fits_device(device, dtype, layout):
            return None
        return TritonAttention(layout, decoder.num_heads, dtype, device)

    sampler = DeviceSampler(
        facts.vocab_size, request.max_num_sequences, facts.eos_token_ids, device, request.grammars
    )
    steps = DeviceSteps(
        decoder,
        sampler,
        GraphParts(make_attention, partial(CudaRecorder, device)) if request.has_graphs else None,
        max_num_sequences=request.max_num_sequences,
        max_model_len=facts.max_model_len,
        vocab_size=facts.vocab_size,
        announce=request.announce,
    )
    return sampler, steps
