"""The typed client of a gateway.

with PageframeClient("127.0.0.1:50051") as client:
    for event in client.generate(GenerationRequest(prompt="Once", max_tokens=8)):
        ...
"""

from pageframe.client.aio import AsyncPageframeClient
from pageframe.client.channel import DEFAULT_SERVER
from pageframe.client.sync import PageframeClient
from pageframe.client.types import (
    Delta,
    Event,
    Finished,
    GenerationRequest,
    GenerationResult,
    MemoryAccount,
    Message,
    Model,
    Sample,
    Started,
    collect,
)
from pageframe.core.beams import BeamParams, EarlyStopping
from pageframe.core.grammar import Grammar, GrammarForm
from pageframe.rpc.tls import ClientTls

__all__ = [
    "DEFAULT_SERVER",
    "AsyncPageframeClient",
    "BeamParams",
    "ClientTls",
    "Delta",
    "EarlyStopping",
    "Event",
    "Finished",
    "GenerationRequest",
    "GenerationResult",
    "Grammar",
    "GrammarForm",
    "MemoryAccount",
    "Message",
    "Model",
    "PageframeClient",
    "Sample",
    "Started",
    "collect",
]
