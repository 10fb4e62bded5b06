"""A neutral referee: a trainer's own functions on nasty batches, beside the papers' formulas.

`ppo-fast verify TRAINER` is the command, `verify()` the function. docs/verify.md.
"""
