"""Music for the examples: where songs come from, what is measured, drawn and trained."""
