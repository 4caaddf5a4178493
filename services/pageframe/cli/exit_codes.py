"""What the exit code of every command means.

0    done; a server that was asked to stop and drained
1    failure: a service gave up, a request failed
2    bad settings or a bad environment: something a person can mend, said in one line
3    replaced: somebody newer serves in its place, and it must not come back by itself
130  interrupted: Ctrl-C before it was ready, or a second Ctrl-C
"""

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_ENVIRONMENT = 2
EXIT_REPLACED = 3
EXIT_INTERRUPTED = 130
