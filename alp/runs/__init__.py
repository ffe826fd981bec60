"""A run's folder, its checkpointed state, and its progress display."""
