"""A million random changes of KV memory, each followed by a look into a second set of books.

python -m bench.soak [--operations N] [--seed S] [--life L] [--json]

driver ─ asks for one change ─▶ audited memory ─▶ engine over a device of fingerprints
                                     │ records, tables, answers
                                     ▼
                                bookkeeper: dicts and sets, written from the law alone
"""
