"""The losses, and how ranks share embeddings for the contrastive one."""
