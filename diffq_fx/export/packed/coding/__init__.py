"""How numbers become bytes: bit planes, entropy coders, streams, and which codes share a stream."""
