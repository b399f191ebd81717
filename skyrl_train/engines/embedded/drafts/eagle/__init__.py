"""EAGLE and EAGLE-3: a small head that goes on from the model's own hidden states."""
