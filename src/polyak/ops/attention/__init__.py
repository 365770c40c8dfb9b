"""Attention with a matrix state: linear, momentum and adaptive momentum attention.

`linear`, `momentum` and `adaptive` hold the public functions.  Below them: `causal` (options, masks
and states around the walk), `walk` and `gradients` (chunk by chunk, forward and backward), `states`
(what chunks write and pass on), `sections` (how a sequence is cut, and the plain equations),
`weights` (what makes the kinds differ), `adaptation`, `adaptation_loop` and `trail` (those of
adaptive momentum).  Beside them, slow and literal: `reference` (quadratic), `recurrence` and
`adaptive_recurrence` (token by token; also how a model decodes).
"""
