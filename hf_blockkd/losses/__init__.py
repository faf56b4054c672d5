"""From rows of logits to scalars."""
