"""What can be done with a cache as a whole, one file each; `distill/run/tools.py` is their command line."""
