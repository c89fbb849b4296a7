"""Where expert bytes are: the host store, the slot pool, and the copies between them."""
