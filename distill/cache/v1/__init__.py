"""Caches of format 1 (November 2026): Exp-Golomb codes in several columns. Read only; `compact` rewrites them."""
