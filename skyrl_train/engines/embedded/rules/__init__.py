"""What is asked of an answer beyond its distribution: grammars and the user's own processors of logits."""
