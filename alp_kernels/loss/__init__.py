"""From hidden states or log-probabilities to the policy loss."""
