"""Expert bytes: the host store, the slot pool, and the copies between them."""
