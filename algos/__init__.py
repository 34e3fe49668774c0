"""Pure tensor mathematics: advantages, objectives, corrections, KL, aggregation. No I/O, never platform/."""
