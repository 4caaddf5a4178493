"""In which order waiting sequences are looked at.

Age and priority are one number, ``turn_ns``: a level of priority is worth some time of waiting, so
whoever waits rises without being moved, and a queue never has to be sorted again. With
``priority-ageing`` 0 a level is worth more time than any request waits, and priorities are strict.
"""

from pageframe.scheduler.policies.protocols import Key, TenantView, WaitingView

_NUM_PARTS = 1024

WINDOW_NS = 2_000_000_000
"""Time by which ``PrefixAwareOrder`` may let one request pass another, nanoseconds."""


class FairOrder:
    """Tenants take turns by what they were served; within a tenant by priority and age.

    The tenant with the least virtual time goes next, see ``shares``. A priority is the caller's own
    word, so it moves nobody of another tenant.
    """

    def key(self, waiting: WaitingView) -> Key:
        """By priority and age."""
        return (waiting.turn_ns,)

    def rank(self, head: WaitingView, tenant: TenantView) -> Key:
        """By virtual time, in parts of a token: a large weight makes it pass slowly."""
        return (int(tenant.virtual_time * _NUM_PARTS), head.turn_ns)


class FirstComeOrder:
    """One line for all tenants, by priority and age; those that come again first."""

    def key(self, waiting: WaitingView) -> Key:
        """By priority and age."""
        return (waiting.turn_ns,)

    def rank(self, head: WaitingView, tenant: TenantView) -> Key:
        """The same over all tenants."""
        return (not head.has_run, head.turn_ns)


class PrefixAwareOrder(FairOrder):
    """Like ``FairOrder``, but prompts of a tenant that begin alike come in together.

    Time is cut into windows, and within one window the groups follow one another, so what one of
    a group has computed is still in memory for the next. Every other window goes through its groups
    backwards: the group that ended one window begins the next. Nobody is passed by a request whose
    turn would have come ``WINDOW_NS`` later, or more.

        window      [ a1 b1 a2 c1 b2 )[ b3 a3 c2 a4 )
        comes in    [ a1 a2 b1 b2 c1 )[ c2 b3 a3 a4 )

    SGLang orders a whole queue by the longest match (Zheng et al., 2023); there a request with a
    rare prefix may wait for ever.
    """

    def key(self, waiting: WaitingView) -> Key:
        """By window, group, priority and age."""
        window = waiting.turn_ns // WINDOW_NS
        group = -waiting.prefix_group if window % 2 else waiting.prefix_group
        return (window, group, waiting.turn_ns)
