"""The tokenisers of the replicas that are served now; each loaded once for its model folder."""

import asyncio
import contextlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import Final

from pageframe.core.errors import InvalidRequestError, PreconditionError
from pageframe.core.replica import ReplicaFacts
from pageframe.gateway.tokenizer import TextCodec

_NUM_CODECS_MAX: Final = 8


class CodecStore:
    """Holds the codecs used last; a replica that comes back with another model brings another."""

    def __init__(self) -> None:
        self._codecs: OrderedDict[str, TextCodec] = OrderedDict()
        self._lock = asyncio.Lock()

    async def find(self, facts: ReplicaFacts) -> TextCodec | None:
        """The codec of the replica; None for a replica without a model folder.

        Raises:
            PreconditionError: the folder holds no usable tokeniser.
        """
        folder = facts.model_folder
        return await self._of_folder(folder) if folder else None

    async def load_ahead(self, folder: Path) -> None:
        """Load the codec of a folder that a replica is going to name.

        A folder without a usable tokeniser is nothing to complain of before a replica names it.
        """
        # As an executor tells it.
        name = await asyncio.to_thread(os.path.realpath, folder)
        with contextlib.suppress(PreconditionError):
            await self._of_folder(name)

    async def _of_folder(self, folder: str) -> TextCodec:
        codec = self._codecs.get(folder)
        if codec is None:
            async with self._lock:
                codec = self._codecs.get(folder) or await _load(folder)
                self._codecs[folder] = codec
                if len(self._codecs) > _NUM_CODECS_MAX:
                    self._codecs.popitem(last=False)
        self._codecs.move_to_end(folder)
        return codec

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


async def _load(folder: str) -> TextCodec:
    return await asyncio.to_thread(TextCodec.load, Path(folder))
