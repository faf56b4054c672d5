"""Enter one model in its middle: find its layers, hand it foreign states, check that it answers like itself."""
