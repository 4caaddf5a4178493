"""What each tenant has been served, and how much of the replica it holds.

Service is counted in tokens: prompt tokens that were computed, and output tokens. What was found in
memory is free, and so is what is computed again after a preemption: that was not the tenant's wish.
Divided by the tenant's weight it is its *virtual time*, and whoever waits with the least goes next.
Who had nobody waiting starts where the others are, so nobody saves up credit by staying away; but
for as many tokens as a step computes, so that it need not wait behind those who are served already.

    virtual time   a ────────────●                    a was served most, per weight
                   b ───────●                         b is next
                   c ──┄┄┄┄┄●                         c comes back: it starts beside b

Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) with tokens for bytes, as the virtual
token counter of Sheng et al. (OSDI 2024) has it. It shares time; what running sequences hold is
shared by the larger of two parts, slots and blocks (dominant resource fairness, Ghodsi et al., NSDI
2011): see ``Shares.is_above``.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pageframe.scheduler.budget import Capacity

WEIGHT_DEFAULT = 1.0

# A tenant counts as present for so long after its last sequence ended.
_PRESENT_NS = 10_000_000_000
# Part of the slots and blocks that those above their share leave for the others.
_HEADROOM_DIVISOR = 16


class Share:
    """The account of one tenant.

    Attributes:
        tenant: Its name.
        weight: Its part is ``weight`` by the weights of all who are present.
        num_output_tokens: Output tokens that it got.
        num_prompt_tokens: Prompt tokens that were computed for it, or will be at once.
        num_living: Sequences that have not ended.
        num_running: Sequences that run.
        num_waiting: Sequences in line.
    """

    __slots__ = (
        "_num_tokens_offset",
        "_start",
        "num_living",
        "num_output_tokens",
        "num_prompt_tokens",
        "num_running",
        "num_waiting",
        "tenant",
        "weight",
    )

    def __init__(self, tenant: str = "", weight: float = WEIGHT_DEFAULT) -> None:
        self.tenant = tenant
        self.weight = weight
        self.num_output_tokens = 0
        self.num_prompt_tokens = 0
        self.num_living = 0
        self.num_running = 0
        self.num_waiting = 0
        self._start = 0.0
        self._num_tokens_offset = 0

    @property
    def num_tokens_served(self) -> int:
        """All that it was served."""
        return self.num_output_tokens + self.num_prompt_tokens

    @property
    def virtual_time(self) -> float:
        """Tokens by weight, from where it started; it falls only when a charge is taken back."""
        return self._start + self.num_tokens_served / self.weight

    @property
    def num_tokens_held(self) -> int:
        """Tokens of its running sequences, known ones, computed or not."""
        # An output is counted once, where it comes in. Whoever joins or leaves is set off by what
        # it has at that moment, so nobody ever adds up over those that run.
        return self.num_output_tokens + self._num_tokens_offset

    def join(self, num_tokens: int) -> None:
        """A sequence of ``num_tokens`` begins to run."""
        self.num_running += 1
        self._num_tokens_offset += num_tokens

    def leave(self, num_tokens: int) -> None:
        """A sequence runs no longer; by now it has ``num_tokens``."""
        self.num_running -= 1
        self._num_tokens_offset -= num_tokens

    def reweigh(self, weight: float) -> None:
        """Another weight from now on; what was served before keeps the one it had."""
        self._start = self.virtual_time - self.num_tokens_served / weight
        self.weight = weight

    def catch_up(self, virtual_time: float) -> None:
        """Start no earlier than at ``virtual_time``."""
        self._start += max(0.0, virtual_time - self.virtual_time)


class Shares:
    """The accounts of all tenants.

    Args:
        weights: By tenant, larger than 0; others have ``WEIGHT_DEFAULT``. Who is named here counts
            as present always.
        num_tokens_ahead: Tokens by which who comes back is ahead of those who wait, at most.
    """

    def __init__(self, weights: Mapping[str, float], *, num_tokens_ahead: int = 0) -> None:
        self._weights = dict(weights)
        self._num_tokens_ahead = num_tokens_ahead
        self._present: dict[str, Share] = {}
        # Those without a living sequence, and since when.
        self._leaving: OrderedDict[str, int] = OrderedDict()
        self._num_running = 0
        self._weight_present = 0.0
        self._weight_waiting = 0.0
        self._served_last: Share | None = None
        self._now_ns = 0
        for tenant in weights:
            self._appear(tenant)

    def __len__(self) -> int:
        return len(self._present)

    @property
    def all(self) -> Iterable[Share]:
        """Of those who are present."""
        return self._present.values()

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Other weights from now on; who is not named any more has ``WEIGHT_DEFAULT``."""
        dropped, self._weights = self._weights.keys() - weights.keys(), dict(weights)
        for tenant in dropped:
            self._reweigh(self._present[tenant], WEIGHT_DEFAULT)
            if not self._present[tenant].num_living:
                self._leaving[tenant] = self._now_ns
        for tenant, weight in weights.items():
            if tenant not in self._present:
                self._appear(tenant)
            self._leaving.pop(tenant, None)
            self._reweigh(self._present[tenant], weight)

    def enter(self, tenant: str) -> Share:
        """The account of ``tenant``, one more of whose sequences lives."""
        share = self._present.get(tenant)
        if share is None:
            share = self._appear(tenant)
        self._leaving.pop(tenant, None)
        share.num_living += 1
        return share

    def exit(self, share: Share) -> None:
        """One of its sequences has ended."""
        share.num_living -= 1
        if not share.num_living and share.tenant not in self._weights:
            self._leaving[share.tenant] = self._now_ns

    def wait(self, share: Share, first: Share | None) -> None:
        """One more of its sequences is in line, where ``first`` is the next; ``None`` if empty."""
        if not share.num_waiting:
            ahead = first or self._served_last
            if ahead is not None:
                share.catch_up(ahead.virtual_time - self._num_tokens_ahead / share.weight)
            self._weight_waiting += share.weight
        share.num_waiting += 1

    def stop_waiting(self, share: Share) -> None:
        """One of its sequences is in line no longer."""
        share.num_waiting -= 1
        if not share.num_waiting:
            self._weight_waiting -= share.weight

    def join(self, share: Share, num_tokens: int) -> None:
        """A sequence of ``num_tokens`` begins to run."""
        self._num_running += 1
        self._served_last = share
        share.join(num_tokens)

    def leave(self, share: Share, num_tokens: int) -> None:
        """A sequence runs no longer; by now it has ``num_tokens``."""
        self._num_running -= 1
        share.leave(num_tokens)

    def forget(self, now_ns: int) -> None:
        """Forget who has been away for a while; it is ``now_ns``, also for those who leave next."""
        self._now_ns = now_ns
        while self._leaving:
            tenant, since_ns = next(iter(self._leaving.items()))
            if now_ns - since_ns < _PRESENT_NS:
                return
            del self._leaving[tenant]
            self._weight_present -= self._present.pop(tenant).weight

    def part_of(self, share: Share) -> float:
        """The part of the replica that is its own while all who are present want theirs."""
        return share.weight / self._weight_present

    def use_of(
        self, share: Share, capacity: "Capacity", *, num_more: int = 0, num_tokens_more: int = 0
    ) -> float:
        """The part of the replica that its running sequences take: of slots or of KV memory.

        As it would be with so many more of them, and of their tokens; less if below 0.
        """
        num_blocks = capacity.num_blocks(share.num_tokens_held + num_tokens_more)
        num_running = share.num_running + num_more
        return max(num_running / capacity.max_num_running, num_blocks / capacity.num_blocks_total)

    def is_above(self, share: Share, capacity: "Capacity") -> bool:
        """Whether it takes more than its part."""
        return self.use_of(share, capacity) > self.part_of(share)

    def headroom(self, share: Share, capacity: "Capacity") -> float:
        """The part of slots and blocks that another admission of ``share`` has to leave free.

        It is what others could still claim who have nobody in line, but a sixteenth at most;
        nothing for a tenant that stays within its part, nor for one that is alone. So somebody who
        sends little finds a place at once, though another would fill them all; and those who wait
        too have their turns by what they were served.
        """
        part = self.part_of(share)
        if self.use_of(share, capacity) < part:
            return 0.0
        num_others = self._num_running - share.num_running
        unclaimed = 1.0 - part - num_others / capacity.max_num_running
        absent = 1.0 - self._weight_waiting / self._weight_present
        # Sums of weights are not exact, and nothing has to be nothing.
        return min(1.0 / _HEADROOM_DIVISOR, max(0.0, round(min(unclaimed, absent), 6)))

    def _reweigh(self, share: Share, weight: float) -> None:
        self._weight_present += weight - share.weight
        if share.num_waiting:
            self._weight_waiting += weight - share.weight
        share.reweigh(weight)

    def _appear(self, tenant: str) -> Share:
        share = Share(tenant, self._weights.get(tenant, WEIGHT_DEFAULT))
        self._present[tenant] = share
        self._weight_present += share.weight
        return share
