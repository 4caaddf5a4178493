"""What was asked of the memory and answered by it, about sequences and about what is kept.

Nothing here has seen the memory's own books.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from bench.soak.entries import Name
from bench.soak.fingerprints import extend, root_of
from pageframe.core.plan import Announcement


@dataclass(eq=False)
class KnownSequence:
    """One sequence as its scheduler sees it.

    Attributes:
        announcement: As it was sent.
        salt: Of its tenant.
        tokens: All its tokens.
        chain: Their fingerprints.
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
    tokens: list[int] = field(default_factory=list)
    chain: list[int] = field(default_factory=list)
    generation: int = 0
    num_computed: int = 0
    is_running: bool = False
    num_kept: int = 0
    kept_names: list[Name] = field(default_factory=list)
    num_promotions: int = 0
    has_left: bool = False

    def __post_init__(self) -> None:
        for token_id in self.announcement.token_ids if not self.tokens else ():
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
        before = self.chain[-1] if self.chain else root_of(self.salt)
        self.tokens.append(token_id)
        self.chain.append(extend(before, token_id))

    def fork(self, child_id: int, sample_index: int) -> "KnownSequence":
        """A child that has all the tokens of this one, and runs."""
        announcement = replace(
            self.announcement, sequence_id=child_id, sample_index=sample_index, generation=0
        )
        tokens, chain = self.tokens.copy(), self.chain.copy()
        return KnownSequence(announcement, self.salt, tokens, chain, is_running=True)

    def names_of_blocks(self, num_tokens: int, block_size: int) -> list[int]:
        """What names the content of each full block: its last fingerprint."""
        return self.chain[block_size - 1 : num_tokens : block_size]


def names_of(salt: int, token_ids: Sequence[int], block_size: int) -> list[int]:
    """The same of tokens that belong to no sequence."""
    last, names = root_of(salt), []
    for number, token_id in enumerate(token_ids, start=1):
        last = extend(last, token_id)
        if number % block_size == 0:
            names.append(last)
    return names


@dataclass(eq=False)
class Kept:
    """A prefix that is kept by name.

    Attributes:
        tenant: Whose.
        names: Last fingerprint of each of its full blocks.
        expire_ns: When it ends.
        demote_ns: When it leaves the device; 0 for never.
        is_idle: Whether that time has come since it was kept last, or its pins may have given way
            to those who needed room.
    """

    tenant: str
    names: list[int]
    expire_ns: int
    demote_ns: int = 0
    is_idle: bool = False


KeptName = tuple[str, str, str]
"""Kind, tenant and name."""


class KeptPrefixes:
    """Everything that is kept by name, and how often each content is."""

    def __init__(self) -> None:
        self._kept: dict[KeptName, Kept] = {}
        self._by_content: dict[int, set[KeptName]] = {}

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
            if not self._by_content[content]:
                del self._by_content[content]

    def names(self) -> list[KeptName]:
        """All names, oldest first."""
        return list(self._kept)

    def of_content(self, content: int) -> list[Kept]:
        """Who keeps a block of this content."""
        return [self._kept[name] for name in sorted(self._by_content.get(content, ()))]

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
