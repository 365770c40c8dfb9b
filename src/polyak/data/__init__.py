"""Data: corpora, tokenizers, token shards with a hashed manifest, and batches.

Text flows through four modules: `corpora` (documents by name or path), `tokenizers` (bytes or
byte-level BPE), `prepare` (memory-mapped shards of token ids) and `batches` (the batch at a step
is a pure function of the seed and the step). Nothing here imports torch.
"""
