"""The latent key-value cache: how keys and values are factored (``compress.py``), and how attention runs on latents."""
