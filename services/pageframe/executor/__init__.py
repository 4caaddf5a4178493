"""Owns KV memory and the model runner; does what plans say."""
