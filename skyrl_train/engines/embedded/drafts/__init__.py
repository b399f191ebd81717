"""Speculation: who guesses the next tokens. What is guessed is only ever accepted if it would have been sampled."""
