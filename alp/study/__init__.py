"""Runs compared: what a paper's figures are made from. A guest of the loop, which does not know it."""
