"""Model runners, the sampler and the KV arena."""
