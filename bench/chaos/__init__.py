"""Kill processes of a running system at random: no request is lost, and no token changes.

    python -m bench.chaos [--rounds N] [--seed S] [--kinds executor,scheduler,gateway]
                          [--runner sim|native] [--model FOLDER] [--json]

A whole ``pageframe up`` under its supervisor, in a pool that is too small for all that is asked. 32
clients ask without a pause, each request again and again. In each round one process gets SIGKILL in
the midst of that, and another one has to be there soon: a probe, sent right after the kill, says
when. The verdict is ``well`` if

- every request ended with the tokens that it gives when nobody dies,
- at the end every block is free or cached, in the books of scheduler and executor, and
- a new request was served within 5 s of the kill, or, when the executor died, of the moment at
  which the next one had loaded its model.

Some requests have several samples; they are resumed like all others. With ``--runner native`` the
real model computes in fp32 on the CPU, and fewer rounds are the default.

Exits 0 only if all is well, 1 otherwise.
"""
