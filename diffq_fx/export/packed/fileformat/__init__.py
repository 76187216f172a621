"""The file itself: a safetensors container with checksums, its header, written atomically."""
