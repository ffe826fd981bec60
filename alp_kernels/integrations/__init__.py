"""ALP in other trainers: one module for each trainer. Users import the module of the trainer they have installed."""
