"""Tuning: which kernel variant of a layer is the fastest on this machine, found by measuring.

`database` holds what was measured, `search` proposes variants, `build` and `measure` try them in processes of their
own, `tuner` puts it together; `metaschedule` is for users of TVM's own tuner.
"""
