"""What a cache survives: `make crash` (ONLY=cache), and in short form a part of `make test`."""
