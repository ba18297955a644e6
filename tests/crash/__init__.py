"""What a cache survives: `make crash`, and in short form a part of `make test`."""
