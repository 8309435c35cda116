"""What modules, callbacks and the comparison share of a fit: reading steps, converting heads, solving, recording."""
