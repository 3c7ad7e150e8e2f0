"""How a model's features change along the trajectory: measured, told and drawn."""
