"""The tokeniser of the replica that is served now; loaded once for each model folder."""

import asyncio
from pathlib import Path

from pageframe.core.errors import InvalidRequestError
from pageframe.core.replica import ReplicaFacts
from pageframe.gateway.tokenizer import TextCodec


class CodecStore:
    """Holds one codec, and loads another one when the replica comes back with another model."""

    def __init__(self) -> None:
        self._folder = ""
        self._codec: TextCodec | None = None
        self._lock = asyncio.Lock()

    async def find(self, facts: ReplicaFacts) -> TextCodec | None:
        """The codec of the replica; None for a replica without a model folder.

        Raises:
            PreconditionError: the folder holds no usable tokeniser.
        """
        if facts.model_folder == self._folder:
            return self._codec
        async with self._lock:
            if facts.model_folder != self._folder:
                self._codec = await _load(facts.model_folder)
                self._folder = facts.model_folder
        return self._codec

    async def get(self, facts: ReplicaFacts) -> TextCodec:
        """The codec of the replica.

        Raises:
            InvalidRequestError: reason NO_TOKENIZER, for a replica without a model folder.
            PreconditionError: the folder holds no usable tokeniser.
        """
        codec = await self.find(facts)
        if codec is None:
            raise InvalidRequestError(
                "NO_TOKENIZER", f"model {facts.model!r} has no tokeniser; send token ids"
            )
        return codec


async def _load(folder: str) -> TextCodec | None:
    return await asyncio.to_thread(TextCodec.load, Path(folder)) if folder else None
