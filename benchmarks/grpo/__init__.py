"""One GRPO step, by TRL and by this library: the same model, prompts, lengths, reward and loss."""
