"""Which experts the next layer will use: predictors, their fit, and their files."""
