"""All Triton kernels on a real GPU: times, peers where there are any, and goals with verdicts."""
