"""The operators as torch sees them: schema, fake, gradient.

    causal_dot       features, causal linear attention and normaliser of q, k, v
    sine_features    features of SPE and F-StrIPE
    conv_features    features of ConvSPE
    banded           attention to the last keys
    noise            Gaussian noise by counter

Each operator has a file of its name here, in each backend, in csrc/cpu and csrc/cuda.
"""
