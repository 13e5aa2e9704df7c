"""Music for the examples: songs, models, training, scores and pictures."""
