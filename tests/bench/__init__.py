"""Measurements, never gates: each module has `run() -> dict` of flat results; ratios are of one process, in turns."""
