"""A request -> images: prompts, pictures that go in, schedules, and what a picture says of its making."""
