"""Domain types and rules that every Pageframe process shares; standard library only."""
