"""Tools that run the model's code, and the multi-turn rollout that calls them."""
