"""Operations of the bookkeeping of KV memory, for ``bench.memory_ops``."""
