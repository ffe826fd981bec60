"""Tools that run the model's code, and the rollout of several turns that calls them."""
