"""KV memory for the pool page, played: a pool of a few numbers, and operations when a test says."""

import asyncio
import base64
import json

import numpy as np

from pageframe.core.errors import NotFoundError, UnavailableError
from pageframe.core.replica import PoolAccount
from pageframe.core.trace import KvCause, KvOperation
from pageframe.wire.memory_facts import (
    BlockExplanation,
    MemorySnapshot,
    OperationBatch,
    OperationRecord,
    SequenceFacts,
    TableFacts,
)

DTYPES = {
    "kind": np.uint8,
    "references": np.int32,
    "holder": np.float64,
    "operation": np.uint8,
    "cause": np.uint8,
    "step": np.float64,
    "seen": np.float64,
}
_STATES = {KvOperation.ALLOCATE: 1, KvOperation.RELEASE: 3, KvOperation.FREE: 0}


class PlayedMemory:
    """Blocks are allocated, released and freed; every sequence has tenant ``red`` and a name."""

    def __init__(self, num_blocks=8):
        self.states = np.zeros(num_blocks, np.uint8)
        self.holder = np.zeros(num_blocks, np.int64)
        self.tenants = {}
        self.number = 100
        self.incarnation = 7
        self.is_away = False
        self.tells_names = True
        self.retentions = []
        self.num_snapshots = 0
        self.num_watches = 0
        self.asked = []
        self._watchers = set()

    async def snapshot(self):
        self.num_snapshots += 1
        self._check()
        held = {int(it) for it in self.holder if it}
        tables = [
            TableFacts(
                sequence_id=it,
                request_id=f"r{it}",
                tenant=self.tenants.get(it, "red"),
                block_ids=np.flatnonzero(self.holder == it).tolist(),
                since_ns=it * 1_000_000,
            )
            for it in sorted(held)
        ]
        return MemorySnapshot(
            step=1,
            operation=self.number,
            pool_incarnation=self.incarnation,
            block_size=16,
            account=PoolAccount(total=len(self.states)),
            states=self.states.copy(),
            ref_counts=(self.states == 1).astype(np.int32),
            pin_counts=np.zeros(len(self.states), np.int32),
            is_indexed=np.zeros(len(self.states), np.bool_),
            tables=tables,
        )

    async def account(self):
        self._check()
        num_held, num_free = (int((self.states == it).sum()) for it in (1, 0))
        return PoolAccount(
            total=len(self.states),
            held=num_held,
            free=num_free,
            fenced=len(self.states) - num_held - num_free,
        )

    async def explain(self, block_id):
        self._check()
        self.asked.append(block_id)
        if block_id >= len(self.states):
            raise NotFoundError("BLOCK_UNKNOWN", f"no block {block_id}")
        return BlockExplanation(
            block_id=block_id,
            state=int(self.states[block_id]),
            num_references=1,
            tenant=self.tenants.get(int(self.holder[block_id]), "red"),
            sequence_ids=[int(self.holder[block_id])],
            retentions=self.retentions,
            operation=KvOperation.ALLOCATE,
            operation_number=3,
            cause=KvCause.DECODE,
            step=9,
            time_ns=2_000_000_000,
        )

    async def watch(self, first_operation, *, pool_incarnation=0):
        self._check()
        assert (first_operation, pool_incarnation) == (self.number + 1, self.incarnation)
        self.num_watches += 1
        inbox = asyncio.Queue()
        self._watchers.add(inbox)
        try:
            while (batch := await inbox.get()) is not None:
                yield batch
            raise UnavailableError("DRAINING", "the executor is stopping")
        finally:
            self._watchers.discard(inbox)

    @property
    def num_watching(self):
        return len(self._watchers)

    def do(self, operation, sequence_id, *block_ids, steps=(), num_lost=0):
        self.number += num_lost
        self._tell([self._record(operation, sequence_id, block_ids)], num_lost, steps)

    def do_all(self, operations, steps=()):
        """Several operations in one batch: (operation, sequence, block) of each."""
        records = [self._record(operation, it, [block]) for operation, it, block in operations]
        self._tell(records, 0, steps)

    def _record(self, operation, sequence_id, block_ids):
        self.number += 1
        self.states[list(block_ids)] = _STATES[operation]
        self.holder[list(block_ids)] = sequence_id if operation is KvOperation.ALLOCATE else 0
        return OperationRecord(
            self.number, operation, KvCause.DECODE, sequence_id, 5, list(block_ids)
        )

    def _tell(self, records, num_lost, steps):
        sequences = [self._facts(it) for it in {it.sequence_id for it in records} if it]
        batch = OperationBatch(records, num_lost, steps, sequences if self.tells_names else ())
        for inbox in self._watchers:
            inbox.put_nowait(batch)

    def _facts(self, sequence_id):
        tenant = self.tenants.get(sequence_id, "red")
        return SequenceFacts(sequence_id, f"r{sequence_id}", tenant, sequence_id * 1_000_000)

    def end_watches(self):
        for inbox in self._watchers:
            inbox.put_nowait(None)

    def _check(self):
        if self.is_away:
            raise UnavailableError("TRANSPORT", "nobody answers at the executor")


class PlayedClients:
    """One played memory for all callers; notes with which credentials it is asked."""

    def __init__(self, memory, credentials):
        self._memory = memory
        self._credentials = credentials

    def client(self, authorization):
        self._credentials.append(authorization)
        return self._memory

    async def close(self):
        self._memory.end_watches()


class Sleeper:
    """Sleeps until the test lets that much time pass."""

    def __init__(self):
        self._sleeping = []

    async def __call__(self, seconds):
        future = asyncio.get_running_loop().create_future()
        self._sleeping.append((seconds, future))
        await future

    def pass_time(self, seconds):
        """End all sleeps that are not longer."""
        awake = [it for it in self._sleeping if it[0] <= seconds]
        self._sleeping = [it for it in self._sleeping if it[0] > seconds]
        for _, future in awake:
            if not future.done():
                future.set_result(None)


class Screen:
    """What a page knows after each frame; raises on a frame that does not fit."""

    def __init__(self):
        self.version = 0
        self.num_whole = 0
        self.columns = {}
        self.holders = {}
        self.names = {}
        self.steps = []
        self.samples = []
        self.away = ""
        self.last = {}

    def take(self, data):
        frame = self.last = json.loads(data)
        assert frame["version"] > self.version
        self.version, self.away = frame["version"], frame["away"]
        if frame.get("whole"):
            self.num_whole += 1
            self.names, self.holders, self.steps, self.samples = {}, {}, [], []
        self.steps += frame["steps"]
        self.samples += frame["stalls"]
        if "columns" not in frame:
            return
        values = {
            name: np.frombuffer(base64.b64decode(text), DTYPES[name])
            for name, text in frame["columns"].items()
        }
        if "ids" in frame:
            ids = np.frombuffer(base64.b64decode(frame["ids"]), np.uint32)
            for name, column in values.items():
                self.columns[name][ids] = column
            for block_id in ids.tolist():
                self.holders.pop(block_id, None)
        else:
            assert frame["whole"]
            self.columns = {name: column.copy() for name, column in values.items()}
        self.holders |= {it[0]: tuple(it[1:]) for it in frame["holders"]}
        self.names |= {it[0]: tuple(it[1:]) for it in frame["names"]}

    def kinds(self):
        names = ("free", "cached", "held", "shared", "pinned", "fenced", "quarantined")
        return [names[it] for it in self.columns["kind"]]
