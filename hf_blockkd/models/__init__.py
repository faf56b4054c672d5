"""One model as people bring it: by name, adapted, quantized, compiled; and its head by itself."""
