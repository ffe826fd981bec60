"""A run's folder, its state, and what a person sees of it while it goes."""
