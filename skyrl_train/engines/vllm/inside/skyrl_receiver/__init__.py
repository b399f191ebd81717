"""What a vLLM server imports of ours, in its own interpreter: torch, safetensors and vLLM, nothing of skyrl_train.

The folder above this package is on the server's PYTHONPATH and holds nothing else.
"""
