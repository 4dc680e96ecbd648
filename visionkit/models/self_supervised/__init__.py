"""Models that learn from images without labels: puzzles made of the images, and what belongs together; one method a file."""
