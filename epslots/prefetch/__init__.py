"""Prediction of the next layer's experts: predictors, their fit, and their files."""
