"""Inference whose result for a request depends on that request and the weights alone, to the bit.

    native/invariant.c     the kernels, and why they are invariant
    kernels                the same on tensors
    operations             the same with gradients
    view                   the trainer's module with its parts replaced by these
    attention              over the engine's paged keys, and over the trainer's packed rows
    sampling               tokens and log-probabilities

Engine and trainer run the same view over the same parameters, so with `rl_on_policy_target` the log-probabilities of
the rollout are the trainer's own. The idea: Horace He and Thinking Machines, "Defeating Nondeterminism in LLM
Inference" (2025).
"""
