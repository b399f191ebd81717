"""The folder that goes on a vLLM server's PYTHONPATH. It holds skyrl_receiver and nothing else."""
