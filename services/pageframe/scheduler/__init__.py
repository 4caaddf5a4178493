"""Decides who runs: logical sequences, queues, budgets, preemption."""
