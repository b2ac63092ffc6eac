"""HTTP: OpenAI's API over the router, and what it lacks under `diffusion`. No torch."""
