"""Serving: one engine for many requests, and what stands around it."""
