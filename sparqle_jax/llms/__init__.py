"""Language models: tokens or embeddings -> hidden states and logits."""
