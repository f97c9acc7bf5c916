"""Training of the evaluated model itself: dense stage, indexer warm-up, sparse stage (DeepSeek-V3.2, section 2.1)."""
