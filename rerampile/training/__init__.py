"""Training of ONNX models with PyTorch, for those who can train: the extra ``rerampile[train]``."""
