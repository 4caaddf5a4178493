"""The block pool and its bookkeeping; pure, no tensors."""
