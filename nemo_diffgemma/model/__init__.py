"""The network: what happens to a token."""
