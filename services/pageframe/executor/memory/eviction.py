"""Which cached block to give up next.

A cached block is worth keeping while it can be reached: a match goes from the head of a chain to
its tail, so a tail whose head is gone is lost as well. Every policy therefore gives up the tail
before the head, which is what vLLM does by freeing in reverse and SGLang by taking leaves only:

    chain  [ head ][      ][      ][ tail ]
                              2nd     1st     victims

``LruEviction`` asks only how long ago a block was needed. ``CostAwareEviction`` asks what it would
cost to have it computed again, and how likely that is.

A policy owns no block and knows no key. It learns of blocks as they become cached and as they are
taken up again, always under these two rules:

1. One call of ``insert`` is one chain, or a piece of one, head first.
2. Every block before that piece in its chain is held, or comes in with the same call. Who puts a
   tail behind a head that is inside already takes the head out first and inserts both together;
   else the head may go first, and the tail stays, out of reach, until its turn comes.

Other policies are found by entry point, group ``pageframe.eviction_policies``: a callable without
arguments that returns one.
"""

import heapq
import importlib.metadata
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol, runtime_checkable

from pageframe.core.errors import InvalidRequestError, PreconditionError
from pageframe.executor.memory.prefix_index import NO_BLOCK

ENTRY_POINT_GROUP = "pageframe.eviction_policies"


@runtime_checkable
class EvictionPolicy(Protocol):
    """Which cached block to give up next. Sees only ids, their place in the chain, and hits."""

    def __len__(self) -> int:
        """How many blocks are inside."""
        ...

    def __contains__(self, block_id: object) -> bool:
        """Whether this block is inside."""
        ...

    def insert(
        self, block_ids: Sequence[int], depths: Sequence[int], parent: int = NO_BLOCK
    ) -> None:
        """These blocks became cached.

        Args:
            block_ids: A chain or a piece of one, head first; none of them is inside.
            depths: Logical index of each in its sequence, growing.
            parent: The indexed block before ``block_ids[0]`` in the chain, which outlives what
                comes in here; ``NO_BLOCK`` if there is none. See ``PrefixIndex.block_before``.
        """
        ...

    def discard(self, block_id: int) -> None:
        """This block, which must be inside, was taken up again or is gone."""
        ...

    def take(self, num_blocks: int) -> list[int]:
        """Remove and return the next victims, first victim first; all if fewer are inside."""
        ...

    def upcoming(self, num_blocks: int) -> list[int]:
        """What ``take`` would return next, or all if fewer are inside. Removes nothing."""
        ...

    def move(self, source: int, target: int) -> None:
        """The content of ``source`` now lies in ``target``, which is not inside.

        What is known about the content goes along. ``source`` may be held: then ``target`` is.
        """
        ...


class LruEviction:
    """Gives up the block that was needed longest ago.

    The simple thing is a dictionary in order of insertion. It has two faults: taking from its
    front walks over what was removed there before, and a block that moves would lose its place. So
    the order is an ``OrderedDict``, a linked list, of tickets; a block changes under its ticket.
    """

    def __init__(self) -> None:
        self._block_ids: OrderedDict[int, int] = OrderedDict()  # By ticket, oldest first.
        self._tickets: dict[int, int] = {}
        self._next_ticket = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, block_id: object) -> bool:
        return block_id in self._tickets

    def insert(
        self, block_ids: Sequence[int], depths: Sequence[int], parent: int = NO_BLOCK
    ) -> None:
        """See ``EvictionPolicy``. The head comes last, so it is the newest of its chain."""
        assert len(block_ids) == len(depths), f"{len(block_ids)} blocks, {len(depths)} depths"
        ticket = self._next_ticket
        for block_id in reversed(block_ids):
            assert block_id not in self._tickets, f"block {block_id} is inside already"
            self._tickets[block_id] = ticket
            self._block_ids[ticket] = block_id
            ticket += 1
        self._next_ticket = ticket

    def discard(self, block_id: int) -> None:
        """See ``EvictionPolicy``."""
        assert block_id in self._tickets, f"block {block_id} is not inside"
        del self._block_ids[self._tickets.pop(block_id)]

    def take(self, num_blocks: int) -> list[int]:
        """See ``EvictionPolicy``."""
        num_victims = min(num_blocks, len(self._tickets))
        victims = [self._block_ids.popitem(last=False)[1] for _ in range(num_victims)]
        for block_id in victims:
            del self._tickets[block_id]
        return victims

    def upcoming(self, num_blocks: int) -> list[int]:
        """See ``EvictionPolicy``."""
        return list(islice(self._block_ids.values(), num_blocks))

    def move(self, source: int, target: int) -> None:
        """See ``EvictionPolicy``. The target takes the source's place in the order."""
        assert target not in self._tickets, f"block {target} is inside already"
        ticket = self._tickets.pop(source, None)
        if ticket is not None:
            self._tickets[target] = ticket
            self._block_ids[ticket] = target


# A token costs about 2 N operations for N weights outside the embeddings, and 4 L H more for each
# token before it (L layers of width H). So attention costs as much as the weights do once there are
# N / (2 L H) tokens before. With N = 12 L H^2, the usual shape, that is 6 H: 24,576 tokens for a
# width of 4,096, or 1,536 blocks of 16 tokens. Only the order of victims depends on it, and not
# steeply.
NUM_BLOCKS_AT_DOUBLE_COST = 1536

# Empty runs that the heap may carry beyond as many as are not, so that a small one is not built
# anew all the time.
_NUM_EMPTY_FREE = 64


@dataclass(slots=True)
class _Run:
    """Blocks next to each other in a chain that came in with one call and one priority.

    Attributes:
        priority: Of all of them.
        block_ids: Tail first; ``NO_BLOCK`` where one was discarded.
        num_passed: So many at the front were taken.
        num_inside: So many of the others were not discarded.
    """

    priority: int
    block_ids: list[int] = field(default_factory=list)
    num_passed: int = 0
    num_inside: int = 0

    def append(self, block_id: int) -> int:
        """Add a block on the head's side, and return its place."""
        self.block_ids.append(block_id)
        self.num_inside += 1
        return len(self.block_ids) - 1

    def remove(self, place: int) -> None:
        """A hit takes blocks up from the head, so the list shrinks from behind as they go."""
        self.block_ids[place] = NO_BLOCK
        self.num_inside -= 1
        while len(self.block_ids) > self.num_passed and self.block_ids[-1] == NO_BLOCK:
            self.block_ids.pop()

    def upcoming(self) -> Iterator[int]:
        """The blocks inside, tail first."""
        remaining = islice(self.block_ids, self.num_passed, None)
        return (block_id for block_id in remaining if block_id != NO_BLOCK)

    def take(self) -> int:
        """Remove and return the block at the tail; one must be inside."""
        while True:
            block_id = self.block_ids[self.num_passed]
            self.num_passed += 1
            if block_id != NO_BLOCK:
                self.num_inside -= 1
                return block_id


class CostAwareEviction:
    """Gives up the block that is cheapest to lose: its cost times how often it is needed.

    GreedyDual-Size-Frequency (Cherkasova, "Improving WWW Proxies Performance with
    Greedy-Dual-Size-Frequency Caching Policy", HP Labs 1998); all blocks have one size, so it drops
    out:

        priority = clock + times it became cached * cost(depth)            cost(d) = D + d

    The clock is the priority of the last victim. So blocks age without being touched: what comes in
    later starts higher, and one that was hit often is given up too if it is not hit any more. The
    first ``D`` of the cost is the weights' part, the same for every block; the rest is that of
    attention, which grows with depth and has doubled the cost at depth ``D``.

    Cost grows with depth, and yet a tail must go before its head. So no block ranks below what it
    leads to: within a call the highest priority is carried from tail to head, and what leaves the
    call at its head is kept as the least priority of ``parent`` for when that comes in. Of equal
    priorities, what came in first goes first, which is the tail again.

    The simple thing is a sorted list of blocks. But because priorities are carried along, those of
    a call are mostly one: a heap holds *runs* of blocks of one priority, far fewer than blocks, and
    a run is a list. Runs that are empty stay on the heap and count for nothing; when half of them
    are empty it is built anew. Each operation costs O(log n) on average, mostly O(1).

    What is known about a block (hits, least priority) stays while it is held and ends when it is
    taken. A block that was discarded because it is gone leaves its history to the next content
    under that id, where it ages like everything else.
    """

    def __init__(self, num_blocks_at_double_cost: int = NUM_BLOCKS_AT_DOUBLE_COST) -> None:
        assert num_blocks_at_double_cost > 0, f"cost doubles at {num_blocks_at_double_cost} blocks"
        self._cost_at_head = num_blocks_at_double_cost
        self._clock = 0
        self._heap: list[tuple[int, int, _Run]] = []  # Priority, running number, run.
        self._num_runs = 0
        self._num_empty = 0
        self._run_of: dict[int, _Run] = {}
        self._places: dict[int, int] = {}  # In the run's list.
        self._histories: dict[int, tuple[int, int]] = {}  # Hits and least priority, by block.

    def __len__(self) -> int:
        return len(self._run_of)

    def __contains__(self, block_id: object) -> bool:
        return block_id in self._run_of

    def insert(
        self, block_ids: Sequence[int], depths: Sequence[int], parent: int = NO_BLOCK
    ) -> None:
        """See ``EvictionPolicy``."""
        assert len(block_ids) == len(depths), f"{len(block_ids)} blocks, {len(depths)} depths"
        run = None
        for block_id, depth in zip(reversed(block_ids), reversed(depths), strict=True):
            assert block_id not in self._run_of, f"block {block_id} is inside already"
            num_hits, least = self._histories.get(block_id, (0, 0))
            num_hits += 1
            priority = max(least, self._clock + num_hits * (self._cost_at_head + depth))
            if run is None or priority > run.priority:
                run = self._open_run(priority)
            self._histories[block_id] = num_hits, run.priority
            self._run_of[block_id] = run
            self._places[block_id] = run.append(block_id)
        if run is not None and parent != NO_BLOCK:
            num_hits, least = self._histories.get(parent, (0, 0))
            self._histories[parent] = num_hits, max(run.priority, least)

    def discard(self, block_id: int) -> None:
        """See ``EvictionPolicy``."""
        assert block_id in self._run_of, f"block {block_id} is not inside"
        run = self._run_of.pop(block_id)
        run.remove(self._places.pop(block_id))
        if run.num_inside == 0:
            self._num_empty += 1
            self._drop_empty()

    def take(self, num_blocks: int) -> list[int]:
        """See ``EvictionPolicy``."""
        victims: list[int] = []
        num_victims = min(num_blocks, len(self._run_of))
        while len(victims) < num_victims:
            run = self._heap[0][2]
            if run.num_inside == 0:
                heapq.heappop(self._heap)
                self._num_empty -= 1
                continue
            self._clock = run.priority
            for _ in range(min(num_victims - len(victims), run.num_inside)):
                block_id = run.take()
                victims.append(block_id)
                del self._run_of[block_id], self._places[block_id], self._histories[block_id]
            if run.num_inside == 0:
                heapq.heappop(self._heap)
        self._drop_empty()
        return victims

    def upcoming(self, num_blocks: int) -> list[int]:
        """See ``EvictionPolicy``."""
        passed: list[tuple[int, int, _Run]] = []
        block_ids: list[int] = []
        while self._heap and len(block_ids) < num_blocks:
            entry = heapq.heappop(self._heap)
            passed.append(entry)
            block_ids += islice(entry[2].upcoming(), num_blocks - len(block_ids))
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return block_ids

    def move(self, source: int, target: int) -> None:
        """See ``EvictionPolicy``. The target takes over the source's place."""
        assert target not in self._run_of, f"block {target} is inside already"
        self._histories.pop(target, None)
        if source in self._histories:
            self._histories[target] = self._histories.pop(source)
        run = self._run_of.pop(source, None)
        if run is not None:
            place = self._places.pop(source)
            run.block_ids[place] = target
            self._run_of[target] = run
            self._places[target] = place

    def _drop_empty(self) -> None:
        """Build the heap anew if more than half of it are empty runs."""
        if 2 * self._num_empty > len(self._heap) + _NUM_EMPTY_FREE:
            self._heap = [entry for entry in self._heap if entry[2].num_inside]
            heapq.heapify(self._heap)
            self._num_empty = 0

    def _open_run(self, priority: int) -> _Run:
        run = _Run(priority)
        heapq.heappush(self._heap, (priority, self._num_runs, run))
        self._num_runs += 1
        return run


_BUILT_IN: dict[str, Callable[[], EvictionPolicy]] = {
    "cost-aware": CostAwareEviction,
    "lru": LruEviction,
}


def load_eviction_policy(name: str) -> EvictionPolicy:
    """A new policy of this name: ``lru``, ``cost-aware``, or one of an installed package.

    The built-in ones are found without the metadata of an installation.

    Raises:
        InvalidRequestError: reason EVICTION_POLICY_UNKNOWN; the message lists what is installed.
        PreconditionError: reason EVICTION_POLICY_BROKEN; an installed one cannot be made.
    """
    make = _BUILT_IN.get(name)
    if make is not None:
        return make()
    installed = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    if name not in installed.names:
        known = ", ".join(sorted({*_BUILT_IN, *installed.names}))
        raise InvalidRequestError(
            "EVICTION_POLICY_UNKNOWN",
            f"eviction policy {name!r} is unknown; installed are {known}",
            eviction_policy=name,
            installed=known,
        )
    return _make_installed(installed[name])


def _make_installed(point: importlib.metadata.EntryPoint) -> EvictionPolicy:
    try:
        policy = point.load()()
    except Exception as error:  # Whatever foreign code raises, the setting is what to look at.
        raise _broken(point, f"{type(error).__name__}: {error}") from error
    if not isinstance(policy, EvictionPolicy):
        raise _broken(point, f"{type(policy).__name__} lacks methods of EvictionPolicy")
    return policy


def _broken(point: importlib.metadata.EntryPoint, why: str) -> PreconditionError:
    return PreconditionError(
        "EVICTION_POLICY_BROKEN",
        f"eviction policy {point.name!r} from {point.value} cannot be made: {why}",
        eviction_policy=point.name,
        entry_point=point.value,
    )
