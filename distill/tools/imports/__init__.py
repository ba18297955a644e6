"""Soft targets that other stacks wrote: one file per format, each of which knows its format and nothing else.

All are read into the sequences of `stream`, which `write` puts into a cache of ours.
"""
