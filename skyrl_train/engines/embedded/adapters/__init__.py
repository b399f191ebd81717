"""LoRA adapters, several of them and the plain model in one batch (Hu et al. 2021, equation 3).

    y[t] = W x[t] + s B_k (A_k x[t])        k: the adapter of the request that row t belongs to, or none

    settings   what one engine may serve          adapter   one adapter, checked name by name    folder   peft's files
    sites      the linear maps of a model         rows      which row of a step uses which; the sum above
    places     who may be in the batch            served    all of one engine: names, use, eviction, the policy

The trainer's module is never changed: the sum is made in the engine's twin of it.
"""
