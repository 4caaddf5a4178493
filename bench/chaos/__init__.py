"""Kill processes of a running system at random: no request is lost, and no token changes.

    python -m bench.chaos [--rounds 100] [--seed S] [--kinds executor,scheduler,gateway]
                          [--runner sim|native] [--model FOLDER] [--json]

A whole ``pageframe up`` under its supervisor, in a pool that is too small for all that is asked. 32
clients ask without a pause, each request again and again. In each round one process gets SIGKILL in
the midst of that, and another one has to be there soon: a probe, sent right after the kill, says
when. The verdict is ``well`` if

- every request ended with the tokens that it gives when nobody dies,
- at the end every block is free or cached, in the books of scheduler and executor, and
- a new request was served within 5 s of the kill, or, when the executor died, of the moment at
  which the next one had loaded its model.

A request with several samples cannot be resumed at another gateway: when its stream breaks, its
client asks again from the start, and that is counted.

Exits 0 only if all is well, 1 otherwise.
"""
