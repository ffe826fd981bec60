"""Noise on hidden states: `perturb`, `perturb_rms_norm` and the noise itself."""
