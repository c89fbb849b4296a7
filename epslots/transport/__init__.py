"""Between ranks: collectives, and the row of counts that keeps them in step."""
