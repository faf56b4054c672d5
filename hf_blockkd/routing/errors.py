"""The one exception type of the package; every other refusal is a plain `ValueError`."""


class UnsupportedArchitectureError(ValueError):
    """A model has no stack of layers through which foreign hidden states can be routed.

    The message names the model's class and the reason.
    """
