"""Looking inside trained models: curvature of the loss, Jacobians of the blocks, landscape.

Functions here take a model and token ids, never a run folder, and return numbers; `polyak.study`
loads runs and draws. Nothing here changes a weight, and softmax attention is switched to its plain
form only while the analysis runs.
"""
