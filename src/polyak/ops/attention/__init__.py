"""Attention with a matrix state: linear and momentum attention, and its numerics.

`linear` and `momentum` hold the public functions.  Below them: `causal` (options, masks and states
around the walk), `walk` and `gradients` (chunk by chunk, forward and backward), `states` (what
chunks write and pass on), `sections` (how a sequence is cut, and the walk as plain equations),
`weights` (what makes the kinds differ).  Beside them, slow and literal: `reference` (quadratic)
and `recurrence` (token by token, also how a model decodes).
"""
