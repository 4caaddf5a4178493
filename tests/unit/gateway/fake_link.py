"""A stream to a scheduler that does only what the test says."""

from dataclasses import dataclass, field

from pageframe.core.replica import ReplicaFacts
from pageframe.core.request import Completion, Submission
from pageframe.core.step import FinishReason
from pageframe.gateway.mailbox import Mailbox


@dataclass
class FakeLink:
    facts: ReplicaFacts
    submissions: list[Submission] = field(default_factory=list)
    mailboxes: list[Mailbox] = field(default_factory=list)
    cancels: list[tuple[int, int | None]] = field(default_factory=list)

    @property
    def served(self) -> tuple[ReplicaFacts, ...]:
        return (self.facts,)

    def submit(self, submission: Submission, mailbox: Mailbox) -> int:
        self.submissions.append(submission)
        self.mailboxes.append(mailbox)
        submission.handle = len(self.submissions)
        return submission.handle

    def cancel(self, handle: int, sample_index: int | None = None) -> None:
        self.cancels.append((handle, sample_index))

    def end(self, handle: int, sample_index: int = 0, reason=FinishReason.LENGTH, **account):
        self.mailboxes[handle - 1].put_completion(
            Completion(handle=handle, sample_index=sample_index, finish_reason=reason, **account)
        )
