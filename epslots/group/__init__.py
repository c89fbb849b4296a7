"""How ranks become one, and what they agree on."""
