"""How large the noise is: measured by what it does to log-probabilities, and matched to the sampler's mismatch."""
