"""The numerical core of pruning: constraints, engines, refit on a support, and ratios.

Everything here works on the weights of one layer, [groups, outputs, inputs], and on the second moment of its inputs,
[groups, inputs, inputs]; a group is a matrix of its own. No module here knows ONNX.
"""
