"""codistill: pretraining a Mixture-of-Experts student from the forward passes of its teacher."""

import os

__version__ = "0.4.0"

# PyTorch reads it at its first large allocation: huge pages for tensors on the CPU. The experts' gradients are fresh
# memory in every step, and in small pages the system takes longer to hand them out than some layers to compute.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# GNU OpenMP reads it when torch is loaded: turns of a waiting thread before it sleeps. Its own 300,000 bring training
# to a crawl beside any other program (LOG.md, busy machines).
OWN_SPINS = not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
"""The user has not said how threads wait."""
if OWN_SPINS:
    os.environ["GOMP_SPINCOUNT"] = "5000"
