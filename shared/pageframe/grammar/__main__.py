"""Reads grammars in a process of their own, which ends when one takes too long; see ``child``."""

import json
import resource
import signal
import sys

from pageframe.core.errors import InvalidRequestError
from pageframe.core.grammar import Grammar, GrammarForm
from pageframe.core.limits import LIMITS
from pageframe.grammar.library import check_grammar

_MEMORY_BYTES_MAX = 2 << 30


def main() -> None:
    """One line of JSON in, one out, until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES_MAX, _MEMORY_BYTES_MAX))
    for line in sys.stdin.buffer:
        fields = json.loads(line)
        # Time of this process's own: how busy the machine is does not change what is refused. The
        # signal ends the process, wherever it is.
        signal.setitimer(signal.ITIMER_PROF, LIMITS.grammar_compute_seconds_max)
        message = ""
        try:
            check_grammar(Grammar(GrammarForm(fields["form"]), fields["text"]))
        except InvalidRequestError as error:
            message = error.message
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps({"message": message}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
