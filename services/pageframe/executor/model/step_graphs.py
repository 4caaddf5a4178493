"""Decode steps as recorded graphs: one launch instead of some ten for each layer.

A step in which every sequence has one new token does the same work whatever the tokens are. So it
is recorded once for each of some batch sizes, its *buckets*, at warm-up, and launched again by:

    1. writing the step's inputs over those of the step before, at the same addresses
       (``device_inputs``), and padding the batch to the next bucket
    2. one copy to the device, and one there of the block tables to their rows
    3. the graph: split plan ─ tokens ─ all layers ─ logits ─ choose_token ─ newest tokens
    4. the chosen tokens on their way back

What pads a batch writes to no slot, attends to nothing, and its token goes to nobody's row. All
buckets share their buffers: a smaller one uses the first rows. Other steps, and what a graph does
not hold (log-probabilities, grammars, penalties), go the way they always go; the logits of a graph
serve that as well. vLLM and SGLang capture likewise, by padded batch size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.core.units import ceil_div
from pageframe.executor.batch import StepBatch
from pageframe.executor.model.announcing import Announce
from pageframe.executor.model.arena import KvArena
from pageframe.executor.model.decoder import Decoder
from pageframe.executor.model.device_inputs import ComingTokens, DeviceInputs, TokenReturn
from pageframe.executor.model.graph_recorder import Recorder
from pageframe.executor.model.layer_groups import LayerGroups
from pageframe.executor.model.paged_kv import PagedKv
from pageframe.kernels.ops.triton_attention_plan import (
    ITEM_FIELDS,
    MERGE_FIELDS,
    PREFIX_FIELDS,
    SLOT_FIELDS,
    Room,
)
from pageframe.kernels.ops.triton_attention_tables import TritonPlan, decode_plan, fill_decode
from pageframe.kernels.scratch import Scratch

if TYPE_CHECKING:
    # Both need Triton, which is there only where there is a GPU.
    from pageframe.executor.model.device_sampler import DeviceSampler
    from pageframe.kernels.ops.triton_attention import TritonAttention

# From here on a bucket lies between two powers of two: padding costs less than a third.
_HALVES_FROM = 16
_NO_SLOT = -1


def bucket_sizes(max_num_sequences: int) -> list[int]:
    """Batch sizes that are recorded, ascending: 1, 2, 4, 8, 16, 24, 32, 48, ... and the largest."""
    sizes = {max_num_sequences}
    power = 1
    while power < max_num_sequences:
        sizes.add(power)
        if power >= _HALVES_FROM:
            sizes.add(min(power + power // 2, max_num_sequences))
        power *= 2
    return sorted(sizes)


class GraphDecoder(Decoder, Protocol):
    """A ``Decoder`` whose ``forward`` launches the same for all inputs of one size.

    Attributes:
        windows: Of each layer, positions that a token sees, itself included; 0 for all.
    """

    windows: list[int]

    @property
    def num_heads(self) -> int:
        """Query heads."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        ...

    @property
    def scratch(self) -> Scratch:
        """Where it keeps what lives within a step."""
        ...

    def activation_bytes(self, num_tokens: int) -> int:
        """Memory that a step of so many tokens takes in ``forward``, attention's partials apart."""
        ...

    def write_logits(self, outputs: torch.Tensor, logits: torch.Tensor) -> None:
        """Write what ``logits`` would return into a tensor of that shape."""
        ...


@dataclass(frozen=True, slots=True)
class GraphStep:
    """A step that has been launched.

    Attributes:
        logits: float32 [S, V]; valid until the next step is launched.
        coming: The tokens of plain sequences; what comes for others means nothing.
    """

    logits: torch.Tensor
    coming: ComingTokens


@dataclass(frozen=True, slots=True)
class _Table:
    """One plan of attention: for the layers of a group with the same window.

    Attributes:
        group: Which.
        window: Positions that a token sees; None for all.
        slots: Field of its slots.
        prefixes: Field of its prefixes.
        items: Made by the device.
        merges: Made by the device.
    """

    group: int
    window: int | None
    slots: str
    prefixes: str
    items: torch.Tensor
    merges: torch.Tensor


class StepGraphs:
    """Records and launches decode steps of one model over one arena.

    Args:
        decoder: The model.
        arena: Of keys and values.
        groups: Which layers share a block.
        attention: Of these graphs alone: they remember where its results lie.
        sampler: Chooses the tokens.
        recorder: Records.
        max_num_sequences: Most sequences of a step.
        max_model_len: Most tokens of a sequence.
        vocab_size: Number of token ids that logits have.
    """

    def __init__(
        self,
        decoder: GraphDecoder,
        arena: KvArena,
        groups: LayerGroups,
        attention: "TritonAttention",
        sampler: "DeviceSampler",
        recorder: Recorder,
        *,
        max_num_sequences: int,
        max_model_len: int,
        vocab_size: int,
    ) -> None:
        self._decoder = decoder
        self._attention = attention
        self._sampler = sampler
        self._recorder = recorder
        self._kv = PagedKv(arena, groups, attention)
        self._num_groups = len(groups.windows)
        self._sizes = bucket_sizes(max_num_sequences)
        self._most = most = max_num_sequences
        self._block_size = arena.layout.block_size
        self._width = width = ceil_div(max_model_len, self._block_size)
        device = arena.device
        self._rooms: dict[tuple[int | None, int], Room] = {}
        self._plans = self._make_tables(groups, device)
        self._inputs = DeviceInputs(self._fields(), self._num_groups * most * width, device)
        shape = (self._num_groups, most, width)
        self._block_tables = torch.zeros(shape, dtype=torch.int32, device=device)
        self._all_rows = torch.arange(most, device=device)
        self._tokens = torch.zeros(most, dtype=torch.int32, device=device)
        self._logits = torch.zeros(most, vocab_size, device=device)
        self._returned = TokenReturn(most, device)
        # A graph remembers where these lie, so steps that are none must not let them go.
        self._scratch: dict[str, torch.Tensor] = {}
        self._replays: dict[int, Callable[[], None]] = {}

    def record(self, announce: Announce) -> None:
        """Record all buckets, the largest first, over a batch of nothing but padding.

        Args:
            announce: Told how far it is.
        """
        nobody = np.empty(0, np.int32)
        for done, size in enumerate(reversed(self._sizes)):
            announce(
                f"recording decode graphs: {size} sequences ({done + 1} of {len(self._sizes)})",
                done / len(self._sizes),
            )
            self._inputs.begin()
            self._stage_tokens(size, nobody, nobody, np.empty(0, np.int64))
            self._sampler.stage(self._inputs, nobody, nobody, size)
            for table in self._plans:
                self._stage_plan(table, size, nobody, np.empty((0, 0), np.int32))
            self._inputs.send(0)
            self._replays[size] = self._recorder.record(partial(self._run, size))

    def takes(self, batch: StepBatch) -> bool:
        """Whether a step is one of those that were recorded: each sequence decodes one token."""
        num_sequences = len(batch.rows)
        return (
            0 < num_sequences <= self._most
            and bool(self._replays)
            and batch.drafts is None
            and batch.num_decodes == num_sequences == len(batch.samples)
        )

    def launch(self, batch: StepBatch) -> GraphStep:
        """Launch a step that ``takes`` has taken; returns before the device is done with it."""
        num_sequences = len(batch.rows)
        size = next(size for size in self._sizes if size >= num_sequences)
        self._inputs.begin()
        self._stage_tokens(size, batch.token_ids, batch.positions, batch.slots)
        self._sampler.stage(self._inputs, batch.sample_rows, batch.sample_positions, size)
        num_columns = ceil_div(int(batch.context_lens.max()), self._block_size)
        shape = (self._num_groups, num_sequences, num_columns)
        tables = self._inputs.host_tail(np.prod(shape, dtype=int)).reshape(shape)
        for group in range(self._num_groups):
            tables[group] = batch.block_tables[:, group :: self._num_groups][:, :num_columns]
        for table in self._plans:
            self._stage_plan(table, size, batch.context_lens, tables[table.group])
        self._inputs.send(tables.size)
        sent = self._inputs.device_tail(tables.size).view(shape)
        self._block_tables[:, :num_sequences, :num_columns].copy_(sent)
        self._replays[size]()
        return GraphStep(
            logits=self._logits[:num_sequences],
            coming=self._returned.fetch(self._tokens[:num_sequences]),
        )

    def _run(self, size: int) -> None:
        """All that a graph holds: no value of the host is looked at, but sizes."""
        attention, inputs, kept = self._attention, self._inputs, self._decoder.scratch
        plans = {(table.group, table.window): self._plan(table, size) for table in self._plans}
        for plan in plans.values():
            attention.split(plan)
        slots = inputs.device("slots").view(self._num_groups, self._most)[:, :size]
        self._kv.begin_prepared(list(slots.unbind()), plans)
        token_ids = self._sampler.resolve(
            inputs.device("token_ids")[:size], inputs.device("rows")[:size]
        )
        logits = self._logits[:size]
        with kept.apart(self._scratch):
            outputs = self._decoder.forward(
                self._kv, token_ids, inputs.device("positions")[:size], self._all_rows[:size]
            )
            self._decoder.write_logits(outputs, logits)
        self._sampler.choose(inputs, logits, self._tokens[:size])

    def _stage_tokens(
        self,
        size: int,
        token_ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        slots: NDArray[np.int64],
    ) -> None:
        """Write what the model reads; arrays as in ``StepBatch``."""
        count = len(token_ids)
        for name, values in (("token_ids", token_ids), ("positions", positions)):
            field = self._inputs.host(name)
            field[:count] = values
            field[count:size] = 0
        # The groups take turns in the batch; here each has its slots side by side.
        field = self._inputs.host("slots").reshape(self._num_groups, self._most)
        field[:, :count] = slots.reshape(count, self._num_groups).T
        field[:, count:size] = _NO_SLOT

    def _stage_plan(
        self,
        table: _Table,
        size: int,
        context_lens: NDArray[np.int32],
        block_tables: NDArray[np.int32],
    ) -> None:
        """Write what attention reads, for the layers of one group and window."""
        room = self._room(table.window, size)
        step = self._attention.decode_step(
            context_lens, block_tables, window=table.window, room=room
        )
        inputs = self._inputs
        fill_decode(step, room, inputs.host(table.slots), inputs.host(table.prefixes))

    def _plan(self, table: _Table, size: int) -> TritonPlan:
        return decode_plan(
            self._room(table.window, size),
            window=table.window,
            slots=self._inputs.device(table.slots),
            prefixes=self._inputs.device(table.prefixes),
            tables=self._block_tables[table.group],
            items=table.items,
            merges=table.merges,
        )

    def _room(self, window: int | None, size: int) -> Room:
        room = self._rooms.get((window, size))
        if room is None:
            room = self._attention.decode_room(size, self._width, window=window)
            self._rooms[window, size] = room
        return room

    def _make_tables(self, groups: LayerGroups, device: torch.device) -> list[_Table]:
        windows = [window or None for window in self._decoder.windows]
        wanted = {
            (group, window) for (group, _), window in zip(groups.places, windows, strict=True)
        }
        most = self._most
        return [
            _Table(
                group=group,
                window=window,
                slots=f"slots of plan {index}",
                prefixes=f"prefixes of plan {index}",
                items=torch.zeros(
                    self._room(window, most).num_items,
                    ITEM_FIELDS,
                    dtype=torch.int32,
                    device=device,
                ),
                merges=torch.zeros(most, MERGE_FIELDS, dtype=torch.int32, device=device),
            )
            for index, (group, window) in enumerate(wanted)
        ]

    def _fields(self) -> dict[str, tuple[type[np.generic], int]]:
        most = self._most
        fields: dict[str, tuple[type[np.generic], int]] = {
            "token_ids": (np.int32, most),
            "positions": (np.int32, most),
            "slots": (np.int64, self._num_groups * most),
            **self._sampler.fields(most),
        }
        for table in self._plans:
            num_prefixes = self._room(table.window, most).num_prefixes
            fields[table.slots] = (np.int32, SLOT_FIELDS * most)
            fields[table.prefixes] = (np.int32, PREFIX_FIELDS * num_prefixes)
        return fields
