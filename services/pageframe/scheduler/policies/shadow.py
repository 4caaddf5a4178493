"""One kind of decision: the policy that makes it, the default behind it, and perhaps a shadow.

    question ──▶ chosen policy ──answer──▶ used
           │         └─ broken: the default takes its place for good, and answers this question too
           └───▶ shadow ─────────answer──▶ compared, never used
                     └─ broken: dropped

The default is our own: it is called without a guard, and a fault of it is a fault of ours.
"""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from pageframe.core.clock import Clock
from pageframe.scheduler.policies.guard import BrokenPolicyError, Guard, PolicyFault
from pageframe.scheduler.policies.registry import Group, load

P = TypeVar("P")
A = TypeVar("A")


class Disagreement(NamedTuple):
    """A shadow would have decided otherwise.

    ``choice`` is what is done and ``shadow_choice`` what is not, both in words for a trace.
    """

    group: str
    name: str
    shadow_name: str
    choice: str
    shadow_choice: str


class Decision(Generic[P]):
    """Asks the policy that was chosen for one group.

    Args:
        group: Which group.
        name: The policy that decides.
        shadow_name: The one that looks on; empty for none.
        clock: Times what is not the default.
        on_fault: Told once of each policy that is asked no more.
        on_disagreement: Told of each disagreement, as it happens.

    Attributes:
        group_name: Of the group.
        name: Who decides now.
        shadow_name: Who looks on; empty for nobody.
        num_answers: Answers that a shadow could be compared with.
        num_disagreements: How many of them were others.

    Raises:
        InvalidRequestError: POLICY_UNKNOWN.
        PreconditionError: POLICY_BROKEN.
    """

    def __init__(
        self,
        group: Group[P],
        name: str,
        *,
        shadow_name: str = "",
        clock: Clock,
        on_fault: Callable[[PolicyFault], None],
        on_disagreement: Callable[[Disagreement], None],
    ) -> None:
        self.group_name = group.name
        self._default_name = group.default
        self._default = load(group, group.default)
        self._chosen = Guard(load(group, name), clock) if name != group.default else None
        self._shadow = Guard(load(group, shadow_name), clock) if shadow_name else None
        self.name = name
        self.shadow_name = shadow_name
        self._on_fault = on_fault
        self._on_disagreement = on_disagreement
        self.num_answers = 0
        self.num_disagreements = 0

    @property
    def plain(self) -> P | None:
        """The default, as long as it decides and nobody looks on: it may be asked directly.

        Decisions about order and admission are made several times for each admission.
        """
        return self._default if self._chosen is None and self._shadow is None else None

    def ask(
        self,
        question: Callable[[P], A],
        fault_of: Callable[[A], str],
        words_of: Callable[[A], str],
    ) -> A:
        """What the chosen policy answers, or the default in its place; the shadow is compared.

        Args:
            question: Calls one method of the policy it is given.
            fault_of: What is wrong with an answer; empty when it may be used.
            words_of: What two answers must have in common to agree, in words for a trace.
        """
        answer, other = self.ask_both(question, fault_of)
        if other is not None:
            self.compare(words_of(answer), words_of(other))
        return answer

    def ask_both(
        self, question: Callable[[P], A], fault_of: Callable[[A], str]
    ) -> tuple[A, A | None]:
        """The answer to act on, and that of the shadow; ``None`` when there is no shadow."""
        if self.plain is not None:
            return question(self.plain), None
        answer = self._answer(question, fault_of)
        if self._shadow is None:
            return answer, None
        try:
            return answer, self._shadow.ask(question, fault_of)
        except BrokenPolicyError as error:
            fault = PolicyFault(self.group_name, self.shadow_name, str(error), is_shadow=True)
            self._shadow, self.shadow_name = None, ""
            self._on_fault(fault)
            return answer, None

    def compare(self, choice: str, shadow_choice: str) -> None:
        """Count what the shadow would have done, and tell when it is something else."""
        self.num_answers += 1
        if shadow_choice != choice:
            self.num_disagreements += 1
            self._on_disagreement(
                Disagreement(self.group_name, self.name, self.shadow_name, choice, shadow_choice)
            )

    def _answer(self, question: Callable[[P], A], fault_of: Callable[[A], str]) -> A:
        if self._chosen is not None:
            try:
                return self._chosen.ask(question, fault_of)
            except BrokenPolicyError as error:
                fault = PolicyFault(self.group_name, self.name, str(error), is_shadow=False)
                self._chosen, self.name = None, self._default_name
                self._on_fault(fault)
        answer = question(self._default)
        assert not fault_of(answer), f"{self.group_name} {self._default_name}: {answer}"
        return answer
