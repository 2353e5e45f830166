"""Models on disk and the layers they are made of.

Low-rank layers, folders of safetensors that load without pickle or remote code, GGUF files, and files that appear whole or
not at all.
"""
