"""What was asked of the memory and answered by it, about sequences and about what is kept.

Nothing here has seen the memory's own books.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from bench.soak.entries import Name
from bench.soak.fingerprints import extend, root_of
from bench.soak.shape import Shape
from pageframe.core.plan import Announcement


@dataclass(eq=False)
class KnownSequence:
    """One sequence as its scheduler sees it.

    Attributes:
        announcement: As it was sent.
        salt: Of its tenant.
        num_groups: Groups of layers.
        tokens: All its tokens.
        chains: Their fingerprints in each group.
        generation: Preemptions that were reported.
        num_computed: Tokens that are in the pool, as far as results tell; 0 while it waits.
        is_running: Whether it has a row.
        num_kept: Tokens that the host tier was seen to take in when it was swapped out.
        kept_names: Names of the blocks in which they are.
        num_promotions: Answers in a row that said its content is being promoted.
        has_left: Whether the step in progress has ended it, or begins it anew.
    """

    announcement: Announcement
    salt: int
    num_groups: int
    tokens: list[int] = field(default_factory=list)
    chains: list[list[int]] = field(default_factory=list)
    generation: int = 0
    num_computed: int = 0
    is_running: bool = False
    num_kept: int = 0
    kept_names: list[Name] = field(default_factory=list)
    num_promotions: int = 0
    has_left: bool = False

    def __post_init__(self) -> None:
        if not self.tokens:
            self.chains = [[] for _ in range(self.num_groups)]
            for token_id in self.announcement.token_ids:
                self.append(token_id)

    @property
    def sequence_id(self) -> int:
        """Given by the scheduler."""
        return self.announcement.sequence_id

    @property
    def tenant(self) -> str:
        """Who is charged for what it allocates."""
        return self.announcement.tenant

    @property
    def num_tokens_max(self) -> int:
        """Tokens after which it ends."""
        request = self.announcement
        return request.num_prompt_tokens + request.sampling.max_tokens

    @property
    def is_caught_up(self) -> bool:
        """Whether it takes a token in every step without being named."""
        return self.is_running and len(self.tokens) - self.num_computed == 1

    def append(self, token_id: int) -> None:
        """One more token."""
        self.tokens.append(token_id)
        for group, chain in enumerate(self.chains):
            before = chain[-1] if chain else root_of(self.salt, group)
            chain.append(extend(before, token_id))

    def fork(self, child_id: int, sample_index: int) -> "KnownSequence":
        """A child that has all the tokens of this one, and runs."""
        announcement = replace(
            self.announcement, sequence_id=child_id, sample_index=sample_index, generation=0
        )
        chains = [chain.copy() for chain in self.chains]
        return KnownSequence(
            announcement, self.salt, self.num_groups, self.tokens.copy(), chains, is_running=True
        )

    def name_of_block(self, logical: int, group: int, block_size: int) -> int:
        """What names the content of a full block: its last fingerprint."""
        return self.chains[group][(logical + 1) * block_size - 1]

    def names_read(self, num_tokens: int, position: int, shape: Shape) -> list[int]:
        """Names of the full blocks of ``num_tokens`` that the token at ``position`` reads."""
        size = shape.block_size
        return [
            self.name_of_block(logical, group, size)
            for logical, group in shape.places_read(num_tokens // size, position)
        ]

    def entries_by_name(self, block_size: int) -> dict[int, int]:
        """Where in a block table each full block stands."""
        return {
            chain[end - 1]: (end // block_size - 1) * self.num_groups + group
            for group, chain in enumerate(self.chains)
            for end in range(block_size, len(chain) + 1, block_size)
        }

    def entry_of_hit(
        self, name: Name | None, content: list[int], entries: dict[int, int], block_size: int
    ) -> int | None:
        """Where in its block table a block stands that was found for it; None if nowhere."""
        if isinstance(name, int) and name in entries:
            return entries[name]
        if isinstance(name, tuple) and name[1] == self.sequence_id:
            return name[3]
        # A hit may end inside a block: then only a part of it is the sequence's.
        for group, chain in enumerate(self.chains):
            if content[0] in chain:
                return chain.index(content[0]) // block_size * self.num_groups + group
        return None


def names_of(salt: int, token_ids: Sequence[int], shape: Shape) -> list[int]:
    """Names of the blocks of a prefix that whoever goes on behind it reads."""
    size = shape.block_size
    end = len(token_ids) // size * size
    lasts = []
    for group in range(shape.num_groups):
        chain = list(accumulate(token_ids, extend, initial=root_of(salt, group)))
        lasts.append(chain[size::size])
    return [lasts[group][logical] for logical, group in shape.places_read(end // size, end)]


@dataclass(eq=False)
class Kept:
    """A prefix that is kept by name.

    Attributes:
        tenant: Whose.
        names: Last fingerprint of each of its full blocks.
        expire_ns: When it ends.
        demote_ns: When it leaves the device; 0 for never.
        is_session: Whether it is a chat's, and no handle.
        is_idle: Whether that time has come since it was kept last, or its pins may have given way
            to those who needed room.
    """

    tenant: str
    names: list[int]
    expire_ns: int
    demote_ns: int = 0
    is_session: bool = False
    is_idle: bool = False


KeptName = tuple[str, str, str]
"""Kind, tenant and name."""


class KeptPrefixes:
    """Everything that is kept by name, and how often each content is."""

    def __init__(self) -> None:
        self._kept: dict[KeptName, Kept] = {}
        self._by_content: dict[int, set[KeptName]] = {}
        self._let_go: dict[int, set[str]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, name: KeptName, kept: Kept) -> None:
        """Keep something new, or something else under this name."""
        self.drop(name)
        self._kept[name] = kept
        for content in kept.names:
            self._by_content.setdefault(content, set()).add(name)

    def drop(self, name: KeptName) -> None:
        """Keep it no longer; a name that is not known is passed over."""
        kept = self._kept.pop(name, None)
        for content in kept.names if kept is not None else ():
            self._by_content[content].discard(name)
            self._let_go.setdefault(content, set()).add(name[1])
            if not self._by_content[content]:
                del self._by_content[content]

    def names(self) -> list[KeptName]:
        """All names, oldest first."""
        return list(self._kept)

    def of_content(self, content: int) -> list[Kept]:
        """Who keeps a block of this content."""
        return [self._kept[name] for name in sorted(self._by_content.get(content, ()))]

    def let_go(self, content: int) -> set[str]:
        """Tenants who have let go of such a block since ``forget_let_go``."""
        return self._let_go.get(content, set())

    def forget_let_go(self) -> None:
        """An operation is over: who has let go in it can be charged for nothing any more."""
        self._let_go.clear()

    def give_way(self, content: int) -> None:
        """Somebody's pin on a block of this content gave way; the records do not say whose."""
        for name in self._by_content.get(content, ()):
            self._kept[name].is_idle = True

    def pass_time(self, now_ns: int) -> None:
        """Drop what has expired; note what has become idle."""
        for name, kept in list(self._kept.items()):
            if kept.expire_ns <= now_ns:
                self.drop(name)
            elif kept.demote_ns and kept.demote_ns <= now_ns:
                kept.is_idle = True
