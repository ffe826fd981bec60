"""What is measured of a policy: accuracy, and how far it is from what sampled."""
