"""What can be done with a cache as a whole, one file each; `distill/tools/commands.py` is their command line."""
