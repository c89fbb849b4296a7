"""Ranks that outlive their driver: who may drive them, what they were loaded with, and how Ray knows of them."""
