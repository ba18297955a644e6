"""Soft targets that other stacks wrote: one file per format, all read into the sequences of `sequences.py`.

`importer.write` puts these into a cache of ours.
"""
