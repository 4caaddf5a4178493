"""Asks for one random change after another, as a scheduler, an operator and a clock would.

Prompts begin with one of few texts and go on with one of few tokens, so that they share whole
blocks, and parts of blocks. Victims are offered nearly always, in any order and with any recovery.
"""

import random
from collections.abc import Callable

from bench.soak.audited_memory import AuditedMemory
from bench.soak.known import KnownSequence
from pageframe.core.plan import Announcement, Fork, Recovery, StepPlan
from pageframe.core.replica import TenantQuota
from pageframe.core.sampling import SamplingParams

_TENANTS = ("alice", "bob", "carol")
_NUM_SALTS = 2
_NUM_TEXTS = 3
_NUM_LETTERS = 3
_NUM_WAITING_MAX = 6
_RECOVERIES = (Recovery.RECOMPUTE, Recovery.SWAP, Recovery.SWAP, Recovery.TAIL, Recovery.TAIL)


class Driver:
    """See the module text."""

    def __init__(self, memory: AuditedMemory, source: random.Random) -> None:
        self._memory = memory
        self._random = source
        self._next_id = 1
        shape = memory.shape
        length = shape.max_model_len
        self._texts = [
            [source.randrange(_NUM_LETTERS) + 5 * text for _ in range(length)]
            for text in range(_NUM_TEXTS)
        ]
        self._may_bound = source.random() < 0.4
        self._may_fail = source.random() < 0.5
        self._may_resize = source.random() < 0.6
        self._num_tokens_max = length - 1
        if self._may_resize and shape.num_blocks > 3:
            # A pool shrinks no further than the longest sequence could need.
            most = max(1, shape.num_logical_blocks // 2) * shape.block_size
            self._num_tokens_max = min(self._num_tokens_max, most)
        self._acts: list[tuple[int, Callable[[], None]]] = [
            (20, self._admit),
            (8, self._announce),
            (25, self._decode),
            (10, self._resume),
            (10, self._grow),
            (8, self._fork),
            (3, self._finish),
            (2, self._cancel),
            (2, self._say_something_stale),
            (1, self._rebuild),
            (2, self._pass_time),
        ]
        if shape.has_prefix_cache:
            self._acts += [(4, self._retain), (3, self._release)]
        if self._may_bound:
            self._acts.append((2, self._set_quota))
        if self._may_resize:
            self._acts.append((2, self._resize))
        if self._may_fail:
            self._acts.append((1, self._fail))
        self._weights = [weight for weight, _ in self._acts]

    def act(self) -> None:
        """Ask for one change."""
        if self._random.random() < 0.001:
            self._take_over()
            return
        ((_, act),) = self._random.choices(self._acts, self._weights)
        act()

    def end(self) -> None:
        """End and release everything that is known and kept."""
        memory = self._memory
        memory.cancel(list(memory.sequences))
        for kind, tenant, name in memory.kept.names():
            if kind == "handle":
                memory.release(tenant, name)
        memory.pass_time(10**9)

    def _admit(self) -> None:
        plan = self._new_plan()
        if len(self._chosen(running=False)) < _NUM_WAITING_MAX:
            plan.announce.append(self._new_announcement())
            num_tokens = self._random_chunk()
            plan.may.add(plan.announce[-1].sequence_id, 0, num_tokens)
        self._send(plan)

    def _announce(self) -> None:
        plan = self._new_plan()
        if len(self._chosen(running=False)) < _NUM_WAITING_MAX:
            plan.announce.append(self._new_announcement())
        self._send(plan)

    def _decode(self) -> None:
        self._send(self._new_plan())

    def _resume(self) -> None:
        plan = self._new_plan()
        for known in self._chosen(running=False)[: self._random.choice([1, 1, 3])]:
            plan.may.add(known.sequence_id, known.generation, self._random_chunk())
        self._send(plan)

    def _grow(self) -> None:
        plan = self._new_plan()
        for known in self._chosen(running=True)[:3]:
            plan.may.add(known.sequence_id, known.generation, self._random_chunk())
        self._send(plan)

    def _fork(self) -> None:
        plan = self._new_plan()
        for known in self._chosen(running=True)[:1]:
            num_children = self._random.randint(1, 3)
            first_id, self._next_id = self._next_id, self._next_id + num_children
            plan.forks.append(
                Fork(
                    parent_id=known.sequence_id,
                    generation=known.generation,
                    child_ids=list(range(first_id, self._next_id)),
                    sample_indices=[self._random.randint(1, 9) for _ in range(num_children)],
                    span_ids=[0] * num_children,
                )
            )
        self._send(plan)

    def _finish(self) -> None:
        plan = self._new_plan()
        plan.finish += [known.sequence_id for known in self._any()[:2]]
        self._send(plan)

    def _cancel(self) -> None:
        self._memory.cancel([known.sequence_id for known in self._any()[:2]])

    def _say_something_stale(self) -> None:
        plan = self._new_plan()
        for known in self._any()[:2]:
            plan.must.add(known.sequence_id, known.generation + 1, 3)
            plan.may.add(known.sequence_id, known.generation - 1, 3)
        self._send(plan)

    def _rebuild(self) -> None:
        """Announce a sequence anew, as after the loss of results."""
        plan = self._new_plan()
        for known in self._any()[:1]:
            request = known.announcement
            # Without a prefix cache a child that is announced has no longer its parent's salt.
            has_own_salt = request.sampling.seed == request.sequence_id
            if not (self._memory.shape.has_prefix_cache or has_own_salt):
                continue
            plan.announce.append(
                Announcement(
                    sequence_id=request.sequence_id,
                    generation=known.generation + 1,
                    token_ids=known.tokens.copy(),
                    num_prompt_tokens=request.num_prompt_tokens,
                    sampling=request.sampling,
                    sample_index=request.sample_index,
                    tenant=request.tenant,
                    cache_salt=request.cache_salt,
                    session_id=request.session_id,
                )
            )
        self._send(plan)

    def _pass_time(self) -> None:
        self._memory.pass_time(self._random.choice([1, 30, 200]))

    def _retain(self) -> None:
        tenant, name = self._random.choice(_TENANTS), self._random.choice("xyz")
        salt, tokens = self._random_salt(), self._random_prompt(self._num_tokens_max)
        self._memory.retain(tenant, salt, name, tokens, self._random.choice([20, 100, 500]))

    def _release(self) -> None:
        self._memory.release(self._random.choice(_TENANTS), self._random.choice("xyz"))

    def _set_quota(self) -> None:
        most = self._memory.num_blocks
        floor = self._random.choice([0, 0, self._random.randint(0, most // 3 + 1)])
        ceiling = self._random.choice([None, self._random.randint(floor, most + 1)])
        tenant = self._random.choice(_TENANTS)
        self._memory.set_quota(
            TenantQuota(tenant=tenant, floor_blocks=floor, ceiling_blocks=ceiling)
        )

    def _resize(self) -> None:
        shape = self._memory.shape
        least = max(shape.num_groups, shape.num_blocks // 2)
        self._memory.resize(self._random.randint(least, shape.num_blocks_max))

    def _fail(self) -> None:
        device = self._memory.device
        device.fail_moves = self._random.random() < 0.5
        device.fail_execution = not device.fail_moves
        self._resume()
        device.fail_moves = device.fail_execution = False

    def _take_over(self) -> None:
        self._memory.take_over()
        # Another scheduler counts its sequences from the start.
        self._next_id = 1

    def _send(self, plan: StepPlan) -> None:
        """Complete a plan with what goes on anyway, and have it applied."""
        named = {*plan.may.sequence_ids, *plan.must.sequence_ids}
        num_tokens_left = self._memory.shape.max_step_tokens - self._memory.shape.num_rows
        for known in self._chosen(running=True):
            if known.is_caught_up or known.sequence_id in named:
                continue
            num_tokens = min(self._random_chunk(), num_tokens_left)
            if num_tokens > 0 and self._random.random() < 0.7:
                plan.must.add(known.sequence_id, known.generation, num_tokens)
                num_tokens_left -= num_tokens
        if self._random.random() < 0.95:
            for known in self._chosen(running=True):
                recovery = self._random.choice(_RECOVERIES)
                num_blocks = self._random.randint(0, 3)
                plan.victims.add(known.sequence_id, known.generation, recovery, 0, num_blocks)
        self._memory.step(plan)

    def _new_plan(self) -> StepPlan:
        return StepPlan(step=0, builds_on=0)

    def _any(self) -> list[KnownSequence]:
        known = list(self._memory.sequences.values())
        self._random.shuffle(known)
        return known

    def _chosen(self, *, running: bool) -> list[KnownSequence]:
        return [known for known in self._any() if known.is_running == running]

    def _random_chunk(self) -> int:
        most = self._memory.shape.max_step_tokens - self._memory.shape.num_rows
        return self._random.choice([1, self._random.randint(1, most), most])

    def _random_salt(self) -> int:
        return self._random.randrange(_NUM_SALTS)

    def _random_prompt(self, num_tokens_max: int) -> list[int]:
        """Some of a text, then letters, as long as a few blocks or as a whole sequence."""
        shape = self._memory.shape
        most = min(num_tokens_max, self._random.choice([4 * shape.block_size, 400, num_tokens_max]))
        num_tokens = self._random.randint(1, max(1, most))
        text = self._random.choice(self._texts)
        num_common = self._random.choice([0, num_tokens, self._random.randint(0, num_tokens)])
        num_rest = num_tokens - num_common
        return text[:num_common] + [self._random.randrange(_NUM_LETTERS) for _ in range(num_rest)]

    def _new_announcement(self) -> Announcement:
        sequence_id, self._next_id = self._next_id, self._next_id + 1
        shape = self._memory.shape
        num_logical_blocks = self._memory.num_blocks // shape.num_groups
        most = min(self._num_tokens_max, num_logical_blocks * shape.block_size)
        tokens = self._random_prompt(most)
        room = most - len(tokens) + 1
        has_cache = self._memory.shape.has_prefix_cache
        salt = self._random_salt() if has_cache else sequence_id
        max_tokens = self._random.randint(1, min(room, self._random.choice([4, 40])))
        return Announcement(
            sequence_id=sequence_id,
            token_ids=tokens,
            num_prompt_tokens=len(tokens),
            # The device makes fingerprints from the seed where a tenant's salt would stand.
            sampling=SamplingParams(seed=salt, max_tokens=max_tokens, ignore_eos=True),
            tenant=self._random.choice(_TENANTS),
            cache_salt=b"%d" % salt,
            session_id=self._random.choice(["", "", "chat", "other chat"]),
        )
