"""One engine for many users."""
