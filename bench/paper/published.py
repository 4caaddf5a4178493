"""What the paper says, in figures.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
SOSP 2023, arXiv 2309.06180. Where it says vLLM stands Pageframe here.
"""

from bench.paper.orca import Reservation
from bench.paper.systems import PAGEFRAME

MAX, POW2, ORACLE = (reservation.value for reservation in Reservation)

TOKEN_SHARES = {MAX: 0.204, POW2: 0.268, ORACLE: 0.382, PAGEFRAME: 0.963}
"""Share of KV memory that holds token states, by system; figure 2."""

NUM_RUNNING = {MAX: 7.00, POW2: 9.81, ORACLE: 13.62, PAGEFRAME: 30.42}
"""Mean number of batched requests, OPT-13B, ShareGPT at 2 requests a second; figure 13a."""

NUM_RUNNING_ALPACA = {MAX: 7.00, POW2: 43.24, ORACLE: 72.75, PAGEFRAME: 132.44}
"""The same for Alpaca at 30 requests a second; figure 13b."""

BATCH_RATIOS = {MAX: 4.3, ORACLE: 2.2}
"""How many times the requests are batched that a baseline batches; section 6.2."""

RATE_RATIOS = {MAX: 2.7, ORACLE: 1.7}
"""Lower ends of how many times the request rate is sustained, ShareGPT; section 6.2."""

PARALLEL_SAVINGS = {"ShareGPT": {2: 0.162, 6: 0.305}, "Alpaca": {2: 0.061, 6: 0.098}}
"""Blocks saved in parallel sampling; the ends of the ranges in section 6.3 are 2 and 6 samples."""

BEAM_SAVINGS = {"ShareGPT": {2: 0.443, 6: 0.663}, "Alpaca": {2: 0.376, 6: 0.552}}
"""Blocks saved in beam search, likewise."""
