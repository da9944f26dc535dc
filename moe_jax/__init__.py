"""moe_jax: mixture-of-experts transformers with expert parallelism, on JAX and Flax NNX.

Array names carry their axes as a suffix (`x_TD`, `w_in_EDF`), and einsum strings use the same letters:

    B  sequences in a batch              H  query heads
    S  tokens in a sequence              G  key/value heads (grouped-query attention)
    T  tokens, B * S                     N  width of a head
    D  width of the model                V  vocabulary
    F  hidden width of an expert or FFN  L  layers
    E  experts                           K  experts per token
    A  assignments of tokens to experts  C  capacity: rows an expert's buffer holds
       (T * K for token choice)

Floors, each importing only lower ones (`tests/test_structure.py` walks the imports):

    F0 config validation mesh heap    F3 dispatch sizes   F6 models
    F1 ops                            F4 exchange    F7 data train convert serve
    F2 routing                        F5 layers      F8 analysis, train.loop     F9 configs launch
"""

__version__ = "0.1.0"
