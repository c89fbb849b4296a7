"""Which experts the next layer will use."""
