"""What a slot holds in the soak: one number that names its token and everything before it.

Keys and values of a token depend on all tokens before it. So does its fingerprint, and on the salt
of its tenant as well: a block that is found under the wrong prefix, or by the wrong tenant, differs
even where its own tokens are the same. Python's hash of a tuple of integers is the same in every
process, and quick.
"""

from collections.abc import Sequence

NOTHING = 0
"""What a slot holds of which nothing is known."""


def root_of(salt: int, group: int) -> int:
    """What stands before the first token of everything under a salt, in one group of layers."""
    return hash((salt, -7, group))


def extend(before: int, token_id: int) -> int:
    """The fingerprint of a token, from that of the token before it."""
    return hash((before, token_id))


def token_after(lasts: Sequence[int], sample_index: int, vocab_size: int) -> int:
    """The token that is sampled after ``lasts``, one of each group of layers.

    Each sample of a request gets its own.
    """
    return hash((*lasts, sample_index, 3)) % vocab_size
