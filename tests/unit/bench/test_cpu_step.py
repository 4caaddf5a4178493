"""What a step on a CPU is measured on."""

import bench.cpu_step
from bench.cpu_step import Case, Engine, make_batch
from exactness import tiny_models


def test_a_pool_is_written_before_it_is_read(tmp_path):
    """Memory that nobody has written is one page for all, and takes no time to read."""
    folder = tiny_models.build("llama", tmp_path / "tiny-llama")
    engine = Engine(str(folder), "torch", "float32", "auto", 1)
    assert engine._kv.arena.blocks.all()


def test_a_pool_has_every_block_of_a_case(tmp_path, monkeypatch):
    # 17 tokens take two blocks, of which the second is nearly empty.
    case = Case(num_sequences=5, context_len=17, num_new=1)
    monkeypatch.setattr(bench.cpu_step, "CASES", (case,))
    folder = tiny_models.build("llama", tmp_path / "tiny-llama")
    engine = Engine(str(folder), "torch", "float32", "auto", 1)
    assert make_batch(case, engine.vocab_size).block_tables.max() < len(engine._kv.arena.blocks)
