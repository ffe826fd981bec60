"""A thin training loop around alp_kernels: roll out, score, centre, update, record. Start at train.py."""
