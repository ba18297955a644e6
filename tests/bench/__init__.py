"""Measurements, never gates: each module has `run() -> dict` of flat figures; ratios are of one process, in turns."""
