"""What a step on a CPU is measured on."""

from bench.cpu_step import Engine
from exactness import tiny_models


def test_a_pool_is_written_before_it_is_read(tmp_path):
    """Memory that nobody has written is one page for all, and takes no time to read."""
    folder = tiny_models.build("llama", tmp_path / "tiny-llama")
    engine = Engine(str(folder), "torch", "float32", "auto", 1)
    assert engine._kv.arena.blocks.all()
