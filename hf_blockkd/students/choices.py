"""Names that `make_student` knows, apart from what they do, so that a shell's `--help` need not wait for torch."""

LAYER_CHOICES = ("even", "outer", "kl", "influence")
"""What layers are chosen by (`hf_blockkd.students.layer_scores`)."""
CHANNEL_CHOICES = ("activations", "weights", "random")
"""What channels are chosen by (`hf_blockkd.students.width_scores`)."""
