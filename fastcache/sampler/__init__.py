"""A noise scheduler of diffusers -> a table of numbers, made when it is needed or kept in a bundle."""
