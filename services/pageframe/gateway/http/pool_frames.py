"""What browsers are told of a pool: what has changed since the version that each has.

    mirror ──publish──▶ version n ──┬─ seen n-1: what changed in n          (the usual case)
                                    ├─ seen n-k: what changed since, merged (it was slow)
                                    └─ seen 0, or too old: everything

A viewer is a number, the version that it has. Nothing is queued for it: one that does not read for
a while gets the state of the moment, not the way there. The same frame is encoded once for all.

Columns travel as base64 of little-endian arrays: everything of 10,000 blocks takes 3 ms to write,
and as JSON numbers took 16.
"""

import base64
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pageframe.core.trace import KvCause, KvOperation
from pageframe.core.units import NANOSECONDS_PER_MILLISECOND
from pageframe.gateway.http.exchange import encode_json
from pageframe.gateway.http.pool_mirror import KIND_NAMES, PoolMirror
from pageframe.gateway.http.pool_stalls import StallSample
from pageframe.rpc.auth import Caller
from pageframe.wire.kv_memory import CAUSE_NAMES
from pageframe.wire.memory_facts import StepFacts

NUM_VERSIONS_KEPT: Final = 64
"""A viewer that is further behind gets everything."""

NUM_STEPS_SHOWN: Final = 400
NUM_STALL_SAMPLES: Final = 61

assert sys.byteorder == "little", "columns travel as they lie in memory"

_ALL: Final = slice(None)
_OPERATION_NAMES: Final = ["", *(operation.span_name for operation in KvOperation)]
_CAUSE_NAMES: Final = ["", *(CAUSE_NAMES[cause] for cause in KvCause)]
assert [int(it) for it in KvOperation] == list(range(1, len(_OPERATION_NAMES)))
assert [int(it) for it in KvCause] == list(range(1, len(_CAUSE_NAMES)))


@dataclass(frozen=True, slots=True)
class _Change:
    """What came with one version."""

    block_ids: frozenset[int]
    sequence_ids: frozenset[int]
    steps: Sequence[StepFacts]
    samples: Sequence[StallSample]


class PoolFrames:
    """The versions of one pool, for one caller. Pure: no clock, no waiting.

    Args:
        caller: For whom.

    Attributes:
        version: The newest; viewers begin with 0.
        num_resets: How often a viewer was so far behind that it got everything again.
    """

    def __init__(self, caller: Caller) -> None:
        self.version = 0
        self.num_resets = 0
        self._caller = caller
        self._mirror: PoolMirror | None = None
        # The last operation of the newest version, and its step; the mirror may know later ones.
        self._operation = self._step = 0
        self._away = "the executor has not answered yet"
        self._changes: deque[_Change] = deque(maxlen=NUM_VERSIONS_KEPT)
        self._steps: deque[StepFacts] = deque(maxlen=NUM_STEPS_SHOWN)
        self._samples: deque[StallSample] = deque(maxlen=NUM_STALL_SAMPLES)
        self._encoded: dict[int, bytes] = {}

    def begin(self, mirror: PoolMirror) -> None:
        """A new mirror: everybody gets everything."""
        self._mirror, self._away = mirror, ""
        self._take_news(mirror)
        self._changes.clear()
        self._bump()

    def lose(self, message: str) -> None:
        """The executor is away; what it was like stays."""
        self._away = message
        self._changes.append(_Change(frozenset(), frozenset(), (), ()))
        self._bump()

    def publish(self, steps: Sequence[StepFacts] = (), samples: Sequence[StallSample] = ()) -> None:
        """Make a version of what the mirror has taken in since the last, and of these."""
        changed: frozenset[int] = frozenset()
        named: frozenset[int] = frozenset()
        if self._mirror is not None:
            changed, named = self._take_news(self._mirror)
        self._steps.extend(steps)
        self._samples.extend(samples)
        self._changes.append(_Change(changed, named, steps, samples))
        self._bump()

    def since(self, seen: int) -> bytes:
        """The newest version for who has version ``seen``, as JSON; 0 for who has nothing."""
        num_behind = self.version - seen
        is_whole = not seen or num_behind > len(self._changes)
        if is_whole and seen and num_behind > NUM_VERSIONS_KEPT:
            self.num_resets += 1
        key = 0 if is_whole else seen
        if key not in self._encoded:
            self._encoded[key] = encode_json(self._whole() if is_whole else self._delta(num_behind))
        return self._encoded[key]

    def _take_news(self, mirror: PoolMirror) -> tuple[frozenset[int], frozenset[int]]:
        """Blocks that changed and sequences that were named since the last version."""
        news = frozenset(mirror.changed), frozenset(mirror.named)
        mirror.changed.clear()
        mirror.named.clear()
        self._operation, self._step = mirror.operation, mirror.step
        return news

    def _bump(self) -> None:
        self.version += 1
        self._encoded.clear()

    def _whole(self) -> dict[str, object]:
        frame = self._frame(_ALL, None, list(self._steps), list(self._samples)) | {
            "whole": True,
            "tenant": self._caller.tenant,
            "is_operator": self._caller.is_operator,
            "kinds": KIND_NAMES,
            "operations": _OPERATION_NAMES,
            "causes": _CAUSE_NAMES,
        }
        if self._mirror is not None:
            frame["num_blocks"] = self._mirror.num_blocks
            frame["block_size"] = self._mirror.snapshot.block_size
        return frame

    def _delta(self, num_versions: int) -> dict[str, object]:
        changes = list(self._changes)[len(self._changes) - num_versions :]
        block_ids: set[int] = set().union(*(it.block_ids for it in changes))
        return self._frame(
            np.array(sorted(block_ids), dtype=np.uint32),
            set().union(*(it.sequence_ids for it in changes)),
            [step for it in changes for step in it.steps],
            [sample for it in changes for sample in it.samples],
        )

    def _frame(
        self,
        block_ids: "NDArray[np.uint32] | slice",
        sequence_ids: set[int] | None,
        steps: list[StepFacts],
        samples: list[StallSample],
    ) -> dict[str, object]:
        """``sequence_ids`` None is all that have names."""
        frame: dict[str, object] = {
            "version": self.version,
            "away": self._away,
            "steps": [_step(it) for it in steps],
            "stalls": [_sample(it) for it in samples] if self._caller.is_operator else [],
        }
        mirror = self._mirror
        if mirror is None:
            return frame
        if isinstance(block_ids, slice):
            shared: Mapping[int, Sequence[int]] = mirror.holders()
        else:
            frame["ids"] = _base64(block_ids)
            wanted = block_ids.tolist()
            shared = {it: mirror.holders()[it] for it in wanted if it in mirror.holders()}
        named = mirror.names if sequence_ids is None else sequence_ids & mirror.names.keys()
        columns = mirror.columns(block_ids)
        return frame | {
            "operation": self._operation,
            "step": self._step,
            "columns": {name: _base64(column) for name, column in columns.items()},
            "holders": [[block_id, *ids] for block_id, ids in shared.items()],
            "names": [[it, *_name(mirror.names[it])] for it in named],
            "tenants": [
                [usage.quota.tenant, usage.quota.floor_blocks, usage.quota.ceiling_blocks]
                for usage in mirror.snapshot.quotas
            ],
        }


def _name(name: tuple[str, str, int]) -> tuple[str, str, int]:
    tenant, request_id, since_ns = name
    return tenant, request_id, since_ns // NANOSECONDS_PER_MILLISECOND


def _step(step: StepFacts) -> list[float]:
    return [
        step.step,
        step.start_ns / NANOSECONDS_PER_MILLISECOND,
        step.duration_ns / NANOSECONDS_PER_MILLISECOND,
        step.num_sequences,
        step.num_tokens,
        step.num_free,
    ]


def _sample(sample: StallSample) -> list[object]:
    return [
        sample.time_ns // NANOSECONDS_PER_MILLISECOND,
        round(sample.compute_s * 1000, 3),
        {cause: round(stall_s * 1000, 3) for cause, stall_s in sample.stall_s.items()},
    ]


def _base64(column: "NDArray[Any]") -> str:
    return base64.b64encode(np.ascontiguousarray(column).tobytes()).decode("ascii")
